"""Linear layers and norms with Transformer Engine's parameters, names and state-dict entries."""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .calls import CALLS


class _Base(torch.nn.Module):
    def __init__(self, *args, **keywords):
        super().__init__()
        name = next(base.__name__ for base in type(self).__mro__ if base.__module__ == __name__)
        CALLS.append((f"{name}.__init__", (self, *args), keywords))
        self.build(*args, **keywords)

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise AssertionError("a converted checkpoint has no extra state")


class Linear(_Base):
    def build(
        self, in_features, out_features, *, parallel_mode, tp_group, tp_size, sequence_parallel, params_dtype, device,
        bias, return_bias, **_,
    ):  # fmt: skip
        self.mode, self.group, self.sequence_parallel = parallel_mode, tp_group, sequence_parallel
        self.in_features, self.out_features, self.use_bias, self.tp_size = in_features, out_features, bias, tp_size
        self.return_bias = return_bias
        rows, columns = (1, tp_size) if parallel_mode == "row" else (tp_size, 1)
        shape = (out_features // rows, in_features // columns)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        empty = self.weight.new_empty(0)  # what Transformer Engine leaves where there is no bias
        self.bias = torch.nn.Parameter(self.weight.new_empty(shape[0])) if bias else empty

    def forward(self, x, is_first_microbatch=None):
        out = F.linear(x, self.weight)
        if self.mode == "row" and self.tp_size > 1:
            dist.all_reduce(out, group=self.group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class LayerNormLinear(Linear):
    def build(self, in_features, out_features, *, eps, normalization, zero_centered_gamma=False, **keywords):
        super().build(in_features, out_features, **keywords)
        assert normalization == "RMSNorm"
        self.eps, self.zero_centered = eps, zero_centered_gamma
        self.layer_norm_weight = torch.nn.Parameter(self.weight.new_empty(in_features))

    def forward(self, x, is_first_microbatch=None):
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight + self.zero_centered, self.eps))


class RMSNorm(_Base):
    def build(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, *, device,
    ):  # fmt: skip
        """Megatron 0.16 names the size `hidden_size`, Megatron 0.19 `normalized_shape`; exactly one is given."""
        (size,) = (size for size in (normalized_shape, hidden_size) if size is not None)
        self.eps, self.sequence_parallel, self.zero_centered = eps, sequence_parallel, zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=params_dtype, device=device))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight + self.zero_centered, self.eps)


class LayerNorm(RMSNorm):
    pass


class GroupedLinear(_Base):
    """Only a name: Megatron derives a class from it."""
