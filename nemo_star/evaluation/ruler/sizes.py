"""The size of a haystack that fits, and prompts that do.

Source: `generate_samples` and its like in NVIDIA/RULER, scripts/data/synthetic/ (commit c3f5e3b), and the same
functions of NVIDIA/Star-Attention, ruler/data/synthetic/ (commit c61059f), whose search goes up in steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_star.evaluation.ruler.task import RulerFamily
    from nemo_star.evaluation.task import Prompt

MAX_REDRAWS = 100
"""Of a size that cannot shrink further. The official scripts draw without end."""


def find_size(family: RulerFamily) -> int:
    """The size with which prompts are drawn: one of a drawn prompt that fitted."""
    return _in_steps(family) if family.task.star_paper else _halving(family)


def draw_sample(family: RulerFamily, size: int, index: int) -> Prompt:
    """A prompt that fits: drawn anew, and smaller, while it does not.

    Raises:
        ValueError: the smallest haystack does not fit.
    """
    star, redraws = family.task.star_paper, 0
    while size >= family.smallest and redraws < MAX_REDRAWS:
        prompt = family.draw(size, index)
        if not star:
            prompt = family.final(prompt)
        if _fits(family, family.count(prompt.text) + (family.extra if star else 0)):
            return family.final(prompt) if star else prompt
        redraws += family.shrink(size) == size
        size = family.shrink(size)
    raise family.too_short()


def _fits(family: RulerFamily, tokens: int) -> bool:
    return tokens + family.generate <= family.room


def _halving(family: RulerFamily) -> int:
    """RULER's: the largest size found to fit, each one by a single draw."""
    per_unit = family.count(family.draw(family.probe, 0).text) / family.probe
    low, high = family.step, max(family.bound(per_unit), 2 * family.step)
    found = family.step
    while low <= high:
        middle = (low + high) // 2
        if _fits(family, family.count(family.draw(middle, 0).text) + family.extra):
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found


def _in_steps(family: RulerFamily) -> int:
    """The star paper's: the last step at which a prompt with its answer fits."""
    size, tokens = family.step, 0
    while tokens + family.extra + family.generate < family.room:
        prompt = family.draw(size, 0)
        tokens = family.count(prompt.text + family.answered(prompt))
        if not _fits(family, tokens + family.extra):
            return size - family.step
        size += family.step
        if family.stop_above is not None and family.most is not None and size > family.stop_above:
            return family.most
    return size
