"""How much haystack fits."""

from __future__ import annotations

from collections.abc import Callable

CLOSE = 256
"""A prompt that is under the target by less than this part of it is long enough."""


def fill(
    tokens_of: Callable[[int], int], *, room: int, guess: int, smallest: int = 0, most: int | None = None
) -> int | None:
    """The largest size whose tokens are at most `room`, or one less than 1/256 of it under; None: there is none.

    Sizes are tried where a line through the smallest and the last one meets `room`: two or three from a good guess.

    Args:
        tokens_of: tokens of a prompt of this size; they grow with it.
        guess: is tried first.
        smallest, most: bounds of the size, both included.
    """
    base = tokens_of(smallest)
    if base > room:
        return None
    fits, over = smallest, None if most is None else most + 1
    size = guess
    while over is None or over - fits > 1:
        size = max(fits + 1, size if over is None else min(size, over - 1))
        tokens = tokens_of(size)
        if tokens > room:
            over = size
        else:
            fits = size
            if room - tokens < room // CLOSE:
                break
        slope = max(tokens - base, 1) / (size - smallest)
        size += round((room - tokens) / slope)
    return fits
