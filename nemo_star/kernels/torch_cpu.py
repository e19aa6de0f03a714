"""torch's flash attention on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_star.kernels.two_parts import decode_by_parts
from nemo_star.kernels.window import windowed


class TorchCpuKernel:
    """torch's flash attention for CPU: float32, bfloat16 or float16, grouped queries without repeating K/V.

    torch's `is_causal` is aligned to the top left when sq != sk, and an empty K ends the process: `decode_by_parts`
    asks for neither.
    """

    name = "cpu"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
        if q.shape[0] == k.shape[0] and (window is None or window >= k.shape[0]):
            return _cpu_flash(q, k, v, scale, causal=True)[0]
        return self.decode(q, k, v, scale, causal=True, window=window)[0].to(q.dtype)

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if window is not None and window < k.shape[0]:
            return windowed(_cpu_flash, _cpu_masked, q, k, v, scale, window=window)
        return decode_by_parts(_cpu_flash, q, k, v, scale, causal=causal)

    def decode_ragged(self, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """One query of each sequence over that sequence's keys, which are copied beside each other and masked: a call
        takes longer than a query over some hundred keys.

        Args:
            q: [n, np, hn].
            k, v: n tensors [tokens, ng, hn] of q's type; no token is allowed.

        Returns:
            out [n, np, hn], lse [n, np], float32; over no keys 0 and -inf.
        """
        n, heads, hn = q.shape
        groups = k[0].shape[1]
        keys, values = (pad_sequence(list(tensors), batch_first=True).transpose(1, 2) for tensors in (k, v))
        if not keys.shape[2]:
            return q.new_zeros(q.shape, dtype=torch.float32), q.new_full((n, heads), float("-inf"), dtype=torch.float32)
        lengths = torch.tensor([len(own) for own in k])
        beyond = torch.arange(keys.shape[2]) >= lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=q.dtype).masked_fill_(beyond, float("-inf"))
        mask = mask[:, None, None].expand(n, 1, heads // groups, -1)
        out, lse = _cpu_masked(q.reshape(n, groups, heads // groups, hn), keys, values, mask, scale)
        nothing = (lengths == 0)[:, None]
        out, lse = out.reshape(n, heads, hn).float(), lse.reshape(n, heads).float()
        return out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, float("-inf"))


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel on Megatron's layout: out [sq, b, np, hn], lse [sq, b, np]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1).float()


def _cpu_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same on torch's own layout, with a mask. A query that sees nothing would come back with lse 0."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse
