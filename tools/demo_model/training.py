"""Training by a curriculum, in as many runs as it takes."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from demo_model.maker import Maker
from demo_model.model import MAX_POSITIONS, begin_to_count, build_model, losses
from demo_model.sequence import Batch, Pieces
from demo_model.words import words

REPORT_EVERY = 20
SAVE_EVERY = 50
"""Steps."""
WARM_UP = 30
GUIDE_WEIGHT = 0.5


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum; each starts a new optimizer."""

    lengths: tuple[int, ...]
    """Tokens of a sequence."""
    mixture: Mapping[str, float]
    """Task (`demo_model.maker`) -> its share of the sequences."""
    steps: int
    learning_rate: float
    tokens: int
    """In a step."""
    skip_to: int = 0
    """Positions skip up to this one; 0: none."""


class Training:
    """A model on its way through the stages, from the beginning, or to count, from a checkpoint that retrieves.

    `folder/state.pt` is written every 50 steps; a run that finds it goes on from there. A step's sequences depend on
    the seed, its stage and its number alone, so runs that were interrupted see the same ones.
    """

    def __init__(
        self, folder: Path, stages: tuple[Stage, ...], pieces: Pieces, seed: int, *, count_from: Path | None = None
    ) -> None:
        self._file = folder / "state.pt"
        self._stages, self._pieces, self._seed = stages, pieces, seed
        self._words = words(kept=False)
        self.model: LlamaForCausalLM = build_model(seed)
        if count_from is not None:
            self.model.load_state_dict(LlamaForCausalLM.from_pretrained(count_from, dtype=torch.float32).state_dict())
            begin_to_count(self.model)
        self._stage, self._step, self._seconds = 0, 0, 0.0
        self._optimizer = self._new_optimizer()
        if self._file.exists():
            self._load(torch.load(self._file))

    @property
    def hours(self) -> float:
        """Spent so far, in all runs."""
        return self._seconds / 3600

    def run(self, seconds: float) -> bool:
        """Train for about so many seconds; whether all stages are done."""
        started, before = time.monotonic(), self._seconds
        shown: dict[str, float] = {}
        for figures in self._steps():
            self._seconds = before + time.monotonic() - started
            for name, value in figures.items():
                shown[name] = 0.9 * shown.get(name, value) + 0.1 * value
            if self._step % REPORT_EVERY == 0:
                self._report(shown)
            is_over = time.monotonic() - started > seconds
            if self._step % SAVE_EVERY == 0 or is_over:
                self._save()
            if is_over:
                return False
        self._save()
        return True

    def _steps(self) -> Iterator[dict[str, float]]:
        while self._stage < len(self._stages):
            stage = self._stages[self._stage]
            while self._step < stage.steps:
                yield self._train(stage)
            self._stage, self._step = self._stage + 1, 0
            self._optimizer = self._new_optimizer()

    def _train(self, stage: Stage) -> dict[str, float]:
        rng = random.Random(f"{self._seed}-{self._stage}-{self._step}")
        length = rng.choice(stage.lengths)
        maker = Maker(self._pieces, self._words, rng, length, skip_to=min(stage.skip_to, MAX_POSITIONS))
        tasks = rng.choices(list(stage.mixture), list(stage.mixture.values()), k=max(1, stage.tokens // length))
        batch = Batch.of([maker.make(task) for task in tasks])
        for group in self._optimizer.param_groups:
            group["lr"] = stage.learning_rate * min((self._step + 1) / WARM_UP, 1 - 0.9 * self._step / stage.steps)
        loss, guides, right = losses(self.model, batch)
        self._optimizer.zero_grad()
        (loss + GUIDE_WEIGHT * torch.stack([*guides.values()]).sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._step += 1
        figures = {"loss": loss.item(), **{role: guide.item() for role, guide in guides.items()}}
        for row, task in enumerate(tasks):
            figures[f"right {task}"] = right[row].item()
        return figures

    def _report(self, shown: dict[str, float]) -> None:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in sorted(shown.items()))
        where = f"stage {self._stage + 1}, step {self._step} of {self._stages[self._stage].steps}, {self.hours:.2f} h"
        print(f"{where}: {figures}", file=sys.stderr, flush=True)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def _save(self) -> None:
        state = {
            "stage": self._stage,
            "step": self._step,
            "seconds": self._seconds,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        aside = self._file.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, self._file)

    def _load(self, state: dict[str, Any]) -> None:
        self._stage, self._step, self._seconds = state["stage"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
