"""The experts of one layer of a mixture: their matrices on this rank, and how they lie in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_star.config.model import MoEConfig
from nemo_star.parallel.experts import ExpertLayout

GROUPED_MULTIPLE = 8
"""Of the widths that grouped products take: 16 bytes of bfloat16."""


def runs_grouped_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for all experts at once: in bfloat16, since release 2.10, on compute capability 9 and
    10 (Hopper, and Blackwell in data centres).

    Elsewhere its function is a loop that waits for the device (aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return is_fast and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


class Experts(nn.Module):
    """Gated FFNs of several experts: gate, up [experts, ffn, h], down [experts, h, ffn], their biases without the last
    dimension; or of the shared one, without the first dimension.

    Args:
        place: which of them, and which of their channels, are this rank's.
        shared: the expert that all tokens go through.
    """

    gate_bias: nn.Parameter
    up_bias: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, config: TransformerConfig, moe: MoEConfig, place: ExpertLayout, *, shared: bool = False) -> None:
        super().__init__()
        self._moe, self._place, self._shared = moe, place, shared
        h, ffn = config.hidden_size, moe.ffn_hidden_size // place.expert_tp
        count: tuple[int, ...] = (moe.num_experts // place.ep,)
        if shared:
            count, ffn = (), moe.shared_ffn_hidden_size // place.tp

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*count, *shape, dtype=config.params_dtype))

        self.gate, self.up, self.down = empty(ffn, h), empty(ffn, h), empty(h, ffn)
        self.biased = moe.add_expert_bias and not shared
        if self.biased:
            self.gate_bias, self.up_bias, self.down_bias = empty(ffn), empty(ffn), empty(h)
        self.activation = config.activation_func

    def runs_grouped(self, mine: slice) -> bool:
        """Whether `grouped` is to be taken for these channels: its kernel wants rows in multiples of 16 bytes."""
        first, last, _ = mine.indices(self.ffn)
        sizes = (self.down.shape[-2], self.ffn, first, last - first)
        return all(size % GROUPED_MULTIPLE == 0 for size in sizes) and runs_grouped_on(
            self.down.device, self.down.dtype
        )

    def grouped(self, tokens: Tensor, factors: Tensor, experts: Tensor, ends: Tensor, mine: slice) -> Tensor:
        """What `forward` gives for each expert's tokens, times their factors, in three calls and without asking the
        device how many tokens an expert has.

        Args:
            tokens: [t, h], those of one expert after those of the one before.
            factors: [t] float32.
            experts: [t] int64, increasing; what is no expert of this rank comes last.
            ends: [experts] int32, where each expert's tokens end.
            mine: as for `forward`.

        Returns:
            [t, h]; from `ends[-1]` on whatever lay in memory.
        """
        gate, up = (F.grouped_mm(tokens, weight[:, mine].transpose(1, 2), offs=ends) for weight in (self.gate, self.up))
        if self.biased:
            experts = experts.clamp(max=len(self.gate_bias) - 1)
            gate += self.gate_bias[:, mine][experts]
            up += self.up_bias[:, mine][experts]
        inner = (self._channels(gate, up) * factors[:, None]).to(tokens.dtype)
        out = F.grouped_mm(inner, self.down[..., mine].transpose(1, 2), offs=ends)
        if self.biased and self._adds_last_bias(mine):
            out += (self.down_bias[experts] * factors[:, None]).to(out.dtype)
        return out

    def forward(self, expert: int, tokens: Tensor, mine: slice) -> Tensor:
        """tokens [t, h] through the channels `mine` of an expert.

        Ranks that have other channels of it sum their results: the last bias is added where the first channels are.
        """
        weights = self.gate, self.up, self.down
        gate, up, down = weights if self._shared else (weight[expert] for weight in weights)
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if self.biased:
            last = self.down_bias[expert] if self._adds_last_bias(mine) else None
            biases = self.gate_bias[expert][mine], self.up_bias[expert][mine], last
        inner = self._channels(F.linear(tokens, gate[mine], biases[0]), F.linear(tokens, up[mine], biases[1]))
        return F.linear(inner, down[:, mine], biases[2])

    def _adds_last_bias(self, mine: slice) -> bool:
        return self._place.expert_tp_rank == 0 and not mine.start

    def _channels(self, gate: Tensor, up: Tensor) -> Tensor:
        clamped = None if self._shared else self._moe.clamped_gate
        if clamped is None:
            return self.activation(gate) * up
        gate, up = gate.clamp(max=clamped.limit), up.clamp(-clamped.limit, clamped.limit)
        return gate * torch.sigmoid(clamped.alpha * gate) * (up + 1)

    @property
    def ffn(self) -> int:
        """Channels of an expert on this rank."""
        return self.down.shape[-1]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's dist_checkpointing: `linear_fc1` holds gate and up one after the other."""
        place = self._place
        key = "shared_experts." if self._shared else "experts.experts."
        base = prefix.removesuffix("experts.").removesuffix("shared_") + key
        ahead = len(sharded_offsets)
        of_experts = () if self._shared else ((ahead, place.ep_rank, place.ep),)
        tp, rank = (place.tp, place.tp_rank) if self._shared else (place.expert_tp, place.expert_tp_rank)

        def shard(name: str, weight: Tensor, *divided: tuple[int, int, int]) -> ShardedTensor:
            """divided: (dimension of one expert's, number of the part, parts)."""
            return ShardedTensor.from_rank_offsets(
                f"{base}{name}",
                weight,
                *sharded_offsets,
                *of_experts,
                *((ahead + len(of_experts) + axis, index, count) for axis, index, count in divided),
                replica_id=(0, 0, 0),
                prepend_axis_num=ahead,
            )

        found = {
            f"{prefix}gate": shard("linear_fc1.weight", self.gate, (0, rank, 2 * tp)),
            f"{prefix}up": shard("linear_fc1.weight", self.up, (0, tp + rank, 2 * tp)),
            f"{prefix}down": shard("linear_fc2.weight", self.down, (1, rank, tp)),
        }
        if self.biased:
            found |= {
                f"{prefix}gate_bias": shard("linear_fc1.bias", self.gate_bias, (0, rank, 2 * tp)),
                f"{prefix}up_bias": shard("linear_fc1.bias", self.up_bias, (0, tp + rank, 2 * tp)),
                f"{prefix}down_bias": shard("linear_fc2.bias", self.down_bias),
            }
        return found
