"""What a person sees of a run: what will run, progress, the answer as it comes, times. On rank 0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from nemo_star.methods.method import Method
from nemo_star.runtime.launch import warn


class Console:
    """Standard output has the answer of a single question, standard error all else.

    Args:
        single: one question from the command line, not JSON lines.
    """

    def __init__(self, *, single: bool) -> None:
        self._single = single
        self._bar = tqdm(disable=True)
        self._said: set[str] = set()
        self._described: tuple[int, int] | None = None

    def say(self, message: str, *, warning: bool = False) -> None:
        """A line on standard error, once."""
        if message not in self._said:
            self._said.add(message)
            with tqdm.external_write_mode(file=sys.stderr):
                warn(message) if warning else print(message, file=sys.stderr, flush=True)

    def describe(self, method: Method, context_tokens: int, *, cp_size: int, computes: str) -> None:
        """What will run, before it runs, once for each pair of sizes; `computes` says how."""
        if (sizes := method.sizes(context_tokens)) != self._described:
            self._described = sizes
            cut = f", {words}" if (words := method.describe(context_tokens)) else ""
            held = " + ".join(map(str, method.tokens_by_rank(context_tokens, cp_size)))
            ranks = f"{cp_size} context-parallel rank{'s' * (cp_size > 1)} holding {held} tokens"
            self.say(f"{method.kind} attention: {context_tokens} context tokens{cut}; {ranks}; {computes}")
        if self._single:
            blocks = sum(count for _, count in method.rank_blocks(context_tokens, cp_size, 0))
            self._bar = tqdm(total=blocks, desc="prefill", unit="block", file=sys.stderr, leave=False)

    def count_requests(self, total: int, done: int) -> None:
        """Show progress in requests, of which some were answered by an earlier run."""
        self._bar = tqdm(total=total, initial=done, desc="requests", file=sys.stderr)

    def request_done(self) -> None:
        if not self._single:
            self._bar.update()

    def block_done(self) -> None:
        """Progress of a single question: one of this rank's blocks is encoded."""
        if self._single:
            self._bar.update()

    def show(self, text: str) -> None:
        """Text of a single question's answer, as it comes."""
        if self._single:
            self._bar.close()
            print(text, end="", flush=True)

    def close(self, stats: dict[str, Any], peak_memory_bytes: Sequence[int]) -> None:
        """Times of a single question, and memory."""
        self._bar.close()
        if self._single:
            print(flush=True)
            self.say(summary(stats))
        peaks = " + ".join(f"{peak / 2**20:.0f}" for peak in peak_memory_bytes)
        self.say(f"peak memory per rank: {peaks} MiB")


def summary(stats: dict[str, Any]) -> str:
    """Times of one answered question."""
    speed = stats["decode_tokens_per_second"]
    return (
        f"prefill {stats['prefill_seconds']:.2f} s, first token after {stats['time_to_first_token_seconds']:.2f} s"
        + (f", then {speed:.1f} tokens/s" if speed else "")
    )
