"""How far a sweep has come: its samples, the journal of what is known of them, and the bar that shows it. On rank 0."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_star.config.evaluate import EvaluateConfig
from nemo_star.evaluation.journal import Journal, Key
from nemo_star.evaluation.samples import Asked
from nemo_star.llm.opened import OpenedModel
from nemo_star.runtime.machine import machine

_WITHOUT_EFFECT = ("output", "resume", "overwrite", "parallel", "cache", "cache_dir", "verify")
"""Settings that change nothing in a sample's line."""


class Progress:
    """
    Args:
        without_effect: further settings that change nothing in a sample's line.

    Raises:
        ValueError: as `Journal`.
    """

    def __init__(self, config: EvaluateConfig, *, without_effect: Collection[str] = ()) -> None:
        left_out = {*_WITHOUT_EFFECT, *without_effect}
        self.sweep = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
        self._input = config.input
        folder = Path(str(config.output))
        self._journal = Journal(folder, self.sweep, resume=config.resume, overwrite=config.overwrite)
        self._bar = tqdm(disable=True)

    @property
    def lines(self) -> dict[Key, dict[str, Any]]:
        """Of the samples that are done."""
        return self._journal.lines

    def begin(self, llm: OpenedModel, samples: list[Asked], *, contenders: int) -> None:
        """Warn of what the model is not made for, and begin to write.

        Raises:
            ValueError: no samples, or the longest one does not fit.
        """
        if not samples:
            raise ValueError(f"input={self._input} holds no samples")
        longest = max(samples, key=lambda asked: asked.length)
        for warning in llm.check(longest.length, longest.max_tokens):
            print(f"warning: {warning}", file=sys.stderr)
        self._journal.open()
        total = len(samples) * contenders
        self._bar = tqdm(total=total, initial=len(self.lines), file=sys.stderr, unit="sample")

    def has(self, contender: str, asked: Asked) -> bool:
        return _key(contender, asked) in self.lines

    def add(self, contender: str, asked: Asked, line: dict[str, Any]) -> None:
        self._journal.add(_key(contender, asked), line)
        self._bar.update()

    def describe(self, text: str) -> None:
        """Say beside the bar what is under way."""
        self._bar.set_description(text)

    def close(self) -> None:
        self._bar.close()


def _key(contender: str, asked: Asked) -> Key:
    return contender, asked.task, asked.length, asked.id


def about(config: EvaluateConfig) -> str:
    """Whose figures a report shows: the checkpoint and the machine."""
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    return f"Checkpoint {config.checkpoint}; {facts}."
