"""Which expert of a mixture, or which slice of it, a rank holds. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.parallel.layout import Layout


@dataclass(frozen=True)
class ExpertLayout:
    """Experts over the tp x cp ranks of one stage of a replica: `ep` divide the experts, over cp first as in Megatron,
    then over tp; the tp ranks that are left divide each expert.

    Args:
        tp_rank, cp_rank: of this rank.
    """

    layout: Layout
    tp_rank: int = 0
    cp_rank: int = 0

    @property
    def ep(self) -> int:
        """Ranks that divide the experts."""
        return self.layout.ep

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def over_cp(self) -> bool:
        """Whether cp ranks hold different experts."""
        return self._cp_share > 1

    @property
    def expert_tp(self) -> int:
        """Ranks that divide one expert."""
        return self.tp // (self.ep // self._cp_share)

    @property
    def expert_tp_rank(self) -> int:
        return self.tp_rank % self.expert_tp

    @property
    def ep_rank(self) -> int:
        """Number of this rank's share of the experts."""
        of_tp = self.tp_rank // self.expert_tp
        return of_tp * self._cp_share + (self.cp_rank if self.over_cp else 0)

    @property
    def _cp_share(self) -> int:
        """cp ranks that divide the experts: all or one."""
        return self.layout.cp if self.ep % self.layout.cp == 0 else 1


def check_experts(model: ModelConfig, layout: Layout, *, sequence_parallel: bool = False) -> None:
    """Refuse an expert parallelism that the model or the ranks do not divide by, and what does not go with experts.

    Raises:
        ValueError: names the numbers.
    """
    name, moe = f"parallel.expert_model_parallel_size={layout.ep}", model.moe
    if moe is None:
        if layout.ep > 1:
            raise ValueError(f"{name}: this model has no experts")
        return
    if sequence_parallel:
        raise ValueError(
            "parallel.sequence_parallel=true is not supported for a mixture of experts, which needs the same tokens on "
            "all tensor-parallel ranks: leave it false"
        )
    if moe.num_experts % layout.ep:
        raise ValueError(f"{name} does not divide the model's {moe.num_experts} experts")
    over_cp = layout.cp if layout.ep % layout.cp == 0 else 1
    if layout.tp % (layout.ep // over_cp):
        possible = sorted({c * t for c in (1, layout.cp) for t in range(1, layout.tp + 1) if layout.tp % t == 0})
        raise ValueError(
            f"{name} on {layout.tp} tensor-parallel and {layout.cp} context-parallel ranks of a replica; possible: "
            f"{', '.join(map(str, possible))}"
        )
    expert_tp = layout.tp // (layout.ep // over_cp)
    for what, size, parts in (
        ("moe.ffn_hidden_size", moe.ffn_hidden_size, expert_tp),
        ("moe.shared_ffn_hidden_size", moe.shared_ffn_hidden_size, layout.tp),
    ):
        if size % parts:
            raise ValueError(f"the model's {what} {size} is not divisible by {parts} tensor-parallel ranks")
