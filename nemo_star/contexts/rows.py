"""Which rows of one cache are which rows of another, by the tokens they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nemo_star.methods.partition import Span

Rows = tuple[int, int, int]
"""First row here, first row there, how many."""


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same tokens in as few spans as they take; empty ones go."""
    found: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def common_rows(mine: tuple[Span, ...], theirs: tuple[Span, ...]) -> Iterator[Rows]:
    """The tokens that both hold; the spans of each ascend, and follow each other in its cache."""
    i = j = first = second = 0  # the rows at which spans i and j begin
    while i < len(mine) and j < len(theirs):
        (my_start, my_stop), (their_start, their_stop) = mine[i], theirs[j]
        start, stop = max(my_start, their_start), min(my_stop, their_stop)
        if start < stop:
            yield first + start - my_start, second + start - their_start, stop - start
        if my_stop <= their_stop:
            i, first = i + 1, first + my_stop - my_start
        else:
            j, second = j + 1, second + their_stop - their_start
