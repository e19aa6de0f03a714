"""Mixture of experts in torch alone, in the place of a layer's MLP: Megatron's own layer needs CUDA and Transformer
Engine. Weights and checkpoint keys are Megatron's (`mlp.router`, `mlp.experts.experts`, `mlp.shared_experts`).

A rank holds whole experts, slices of experts, or both: `ep` ranks divide the experts, and the tp ranks that are left
divide each. The tokens of tp ranks are the same, so their results are summed and nothing else is exchanged. Where cp
ranks divide the experts, too, each sends its tokens to all in prefill (they encode different blocks, in step with each
other), and none in decode, where all have the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_star.attention.step import AttentionState, DecodeStep, PrefillStep
from nemo_star.config.model import MLP_CHUNK_TOKENS, MoEConfig
from nemo_star.methods.partition import shares
from nemo_star.models.experts import Experts
from nemo_star.parallel.experts import ExpertLayout
from nemo_star.parallel.groups import all_gather


class Router(nn.Module):
    """Scores of all experts for a token, and the best of them. The same weights on every rank."""

    expert_bias: Tensor

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(moe.num_experts, dtype=dtype)) if moe.router_bias else None
        if moe.correction_bias:
            self.register_buffer("expert_bias", torch.empty(moe.num_experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [t, h] -> (weights [t, k] float32, experts [t, k] int64).

        Softmax as in Mixtral, Qwen and gpt-oss (whose softmax over the chosen ones is the same as their normalised part
        of one over all); sigmoid with a bias that only chooses, and groups of experts, as in DeepSeek-V3
        (arXiv 2412.19437, section 2.1.2) and GLM-4.5.
        """
        moe = self.moe
        if moe.score_function == "softmax":
            scores = F.linear(tokens, self.weight, self.bias).softmax(dim=-1, dtype=torch.float32)
        else:
            bias = None if self.bias is None else self.bias.float()
            scores = F.linear(tokens.float(), self.weight.float(), bias).sigmoid()
        chosen = self._chosen(scores + self.expert_bias if moe.correction_bias else scores)
        weights = scores.gather(1, chosen)
        if moe.normalizes:
            weights = weights / (
                weights.sum(dim=-1, keepdim=True) + (1e-20 if moe.score_function == "sigmoid" else 0.0)
            )
        return weights * moe.scaling_factor, chosen

    def _chosen(self, scores: Tensor) -> Tensor:
        """The best experts [t, k], of the best groups only."""
        moe = self.moe
        if moe.num_groups > 1:
            grouped = scores.view(len(scores), moe.num_groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(moe.groups_per_token, dim=-1).indices
            left_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
            scores = grouped.masked_fill(left_out[..., None], float("-inf")).view_as(scores)
        return scores.topk(moe.experts_per_token, dim=-1).indices

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The bias stays float32 whatever the model's type: differences between experts are small."""
        super()._apply(fn, recurse)
        if self.moe.correction_bias:
            self.expert_bias = self.expert_bias.float()
        return self


class MoE(nn.Module):
    """Router, experts and a shared expert. Built by Megatron's layer; `bound` gives it what the layer does not know."""

    moe: ClassVar[MoEConfig]
    groups: ClassVar[ProcessGroupCollection]
    state: ClassVar[AttentionState]
    place: ClassVar[ExpertLayout]
    is_last = False
    """Of the model's last layer, whose results nobody reads while a context is encoded."""

    @classmethod
    def bound(
        cls, moe: MoEConfig, groups: ProcessGroupCollection, state: AttentionState, place: ExpertLayout
    ) -> type[MoE]:
        """A class for a layer spec."""
        return type(cls.__name__, (cls,), {"moe": moe, "groups": groups, "state": state, "place": place})

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        moe, place = self.moe, self.place
        self.router = Router(moe, config.hidden_size, config.params_dtype)
        self.experts = Experts(config, moe, place)
        self.shared_experts: Experts | None = None
        if moe.shared_ffn_hidden_size:
            self.shared_experts = Experts(config, moe, place, shared=True)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's dist_checkpointing."""
        found: dict[str, Any] = {}
        for name, child in self.named_children():
            found |= sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.groups.tp
            )
        return found

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """hidden [s, b, h] -> (out [s, b, h], no bias)."""
        tokens, step = hidden.flatten(0, 1), self.state.step
        if self.is_last and isinstance(step, PrefillStep) and not self.state.completes_prefill:
            return torch.zeros_like(hidden), None
        if isinstance(step, PrefillStep) and self.place.over_cp:
            return self._over_cp(tokens, step.tokens_by_rank).view_as(hidden), None
        out = torch.empty_like(tokens)
        for chunk, into in zip(tokens.split(MLP_CHUNK_TOKENS), out.split(MLP_CHUNK_TOKENS), strict=True):
            into.copy_(self._same_everywhere(chunk))
        return out.view_as(hidden), None

    def _same_everywhere(self, tokens: Tensor) -> Tensor:
        """Tokens that all ranks of the sum have: tp's, in decode where cp ranks share the work also cp's."""
        decodes = isinstance(self.state.step, DecodeStep)
        by_slices = decodes and self.state.decode_group is not None and not self.place.over_cp
        cp_shares = decodes and (by_slices or self.place.over_cp)
        out = self._routed(tokens, self._slice(self.experts.ffn, by_slices))
        if self.shared_experts is not None:
            out += self.shared_experts(0, tokens, self._slice(self.shared_experts.ffn, cp_shares))
        return self._summed(out, self.groups.tp_cp if cp_shares else self.groups.tp).to(tokens.dtype)

    def _over_cp(self, tokens: Tensor, tokens_by_rank: tuple[int, ...]) -> Tensor:
        """Each cp rank's own tokens, [t, h]: all see all of them, chunk by chunk, and keep the sums of their own."""
        out = torch.empty_like(tokens)
        group = self.groups.cp
        chunk = max(1, MLP_CHUNK_TOKENS // group.size())  # of a rank: each has those of all at a time
        for start in range(0, max(tokens_by_rank), chunk):
            counts = [max(0, min(total - start, chunk)) for total in tokens_by_rank]
            mine = counts[group.rank()]
            padded = tokens.new_zeros(max(counts), tokens.shape[1])
            padded[:mine] = tokens[start : start + mine]
            gathered = all_gather(padded, self.groups.ep)  # its order is not that of what attention exchanges over cp
            every = torch.cat([gathered[rank, :count] for rank, count in enumerate(counts)])
            routed = self._routed(every, slice(None))
            first = sum(counts[: group.rank()])
            if self.shared_experts is not None:
                routed[first : first + mine] += self.shared_experts(0, tokens[start : start + mine], slice(None))
            out[start : start + mine] = self._summed(routed, self.groups.tp_cp)[first : first + mine]
        return out

    def _routed(self, tokens: Tensor, channels: slice) -> Tensor:
        """What this rank's experts add to the result, [t, h] float32; those of a token are sorted by expert first."""
        weights, chosen = self.router(tokens)
        if self.experts.runs_grouped(channels):
            return self._routed_grouped(tokens, weights, chosen, channels)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.moe.num_experts).tolist()
        rows, factors = order // chosen.shape[1], weights.flatten()[order]
        local = self.moe.num_experts // self.place.ep
        first = self.place.ep_rank * local
        out = tokens.new_zeros(tokens.shape, dtype=torch.float32)
        start = sum(counts[:first])
        for expert, count in enumerate(counts[first : first + local]):
            if count:
                mine = rows[start : start + count]
                result = self.experts(expert, tokens[mine], channels)
                out.index_add_(0, mine, result.float() * factors[start : start + count, None])
            start += count
        return out

    def _routed_grouped(self, tokens: Tensor, weights: Tensor, chosen: Tensor, channels: slice) -> Tensor:
        """`_routed` for a device that is not to be waited for."""
        local = self.moe.num_experts // self.place.ep
        # Counted from this rank's first expert, its own come first, and what others have is what lies behind them.
        experts, order = (
            (chosen.flatten() - self.place.ep_rank * local).remainder(self.moe.num_experts).sort(stable=True)
        )
        numbers = torch.arange(local, device=tokens.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        factors = weights.flatten()[order]
        out = self.experts.grouped(tokens[order // chosen.shape[1]], factors, experts, ends, channels)
        if self.place.ep > 1:
            out.masked_fill_((experts >= local)[:, None], 0.0)
        return out[order.argsort()].view(*chosen.shape, out.shape[1]).sum(dim=1, dtype=torch.float32)

    def _slice(self, channels: int, shared: bool) -> slice:
        """The channels of an expert that this cp rank computes."""
        group = self.groups.cp
        return slice(*shares(channels, group.size())[group.rank()]) if shared else slice(None)

    @staticmethod
    def _summed(out: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(out, group=group)
        return out
