"""The planner against published tables, cell by cell (published.yaml)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_star.config.compare import Candidate
from nemo_star.config.compose import compose_group
from nemo_star.config.model import ModelConfig
from nemo_star.config.plan import EfficiencyConfig, MachineConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import Partition, contiguous
from nemo_star.methods.ring import Ring
from nemo_star.parallel.layout import Layout
from nemo_star.planning.time import Clock, layer_time, prefill_seconds
from nemo_star.planning.work import Workload, rank_work

TABLES = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Cell:
    """One published number and what the planner says of it."""

    source: str
    what: str
    context_tokens: int
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the published number; positive: predicted too large."""
        return self.predicted / self.published - 1


def published_cells(efficiency: EfficiencyConfig) -> list[Cell]:
    """Every cell of the published tables."""
    tables: Any = OmegaConf.to_container(OmegaConf.load(TABLES))
    return [cell for table in tables["tables"] for cell in _cells(table, efficiency)]


def median_error(cells: list[Cell]) -> float:
    """Median absolute relative error."""
    return statistics.median(abs(cell.error) for cell in cells)


def _cells(table: dict[str, Any], efficiency: EfficiencyConfig) -> list[Cell]:
    clock = Clock(compose_group(MachineConfig, "machine", table["machine"]), efficiency)
    cells = []
    for what, values in table["values"].items():
        for tokens, value in zip(table["context_tokens"], values, strict=True):
            cells.append(Cell(table["source"], what, tokens, value, _predict(table, clock, what, tokens)))
    return cells


def _predict(table: dict[str, Any], clock: Clock, what: str, tokens: int) -> float:
    metric = table["metric"]
    if metric == "prefill_seconds":
        return prefill_seconds(_work(table, what, tokens), clock)
    if metric == "ratio_of_prefill_seconds":
        over, under = (prefill_seconds(_work(table, word.strip(), tokens), clock) for word in what.split("/"))
        return over / under
    work = _work(table, "star:recompute", tokens)
    rank = rank_work(work)[1]  # the first one with an anchor before its block
    return getattr(layer_time(work, clock, rank, rank.blocks[0][0]), what) * 1e3


class PlainRing(Ring):
    """One contiguous span a rank, as published rings have it: the last rank has almost twice the average work."""

    def partition(self, context_tokens: int, cp_size: int) -> Partition:
        return contiguous(context_tokens, cp_size)


def _work(table: dict[str, Any], word: str, tokens: int) -> Workload:
    cp = table.get("cp_of", {}).get(word, table["cp"])
    model = compose_group(ModelConfig, "model", table["model"])
    method = Candidate.parse(word).method(AttentionConfig(block_size=-(-tokens // table["blocks"])), model)
    if isinstance(method, Ring):
        method = PlainRing(method.settings)
    return Workload(model, Layout(tp=1, cp=cp, dp=1, pp=1), method, tokens, completes_prefill=True)
