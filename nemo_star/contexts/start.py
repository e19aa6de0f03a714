"""The longest known beginning of a text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_star.contexts.fingerprint import end_digest, unit_of
from nemo_star.contexts.folder import Name
from nemo_star.contexts.prefix import common_blocks, pays, reusable
from nemo_star.contexts.shelf import Entry, Shelf
from nemo_star.methods.method import Method


@dataclass(frozen=True)
class Start:
    """A known context that another one can start from."""

    cut: int
    """Tokens of it."""
    name: Name
    entry: Entry | None
    """In memory; None: on disk."""


@dataclass(frozen=True)
class Text:
    """What is asked for."""

    ids: Tensor
    """[tokens] int32."""
    method: Method
    """Sizes settled."""
    root: bytes
    """`root_digest`."""
    name: Name


def longest_start(shelf: Shelf, text: Text, *, has_windows: bool, cp_size: int) -> Start | None:
    """The known context, in memory or on disk, of which most can be used; None where that is none, or does not pay."""
    best: Start | None = None
    for name, entry in _known(shelf):
        if name.owner == text.name.owner:
            cut = reusable(text.method, _common(text, name), name.tokens, has_windows=has_windows)
            # The later ones are those in memory, and of these the ones that were used last.
            if cut and (best is None or cut >= best.cut):
                best = Start(cut, name, entry)
    return best if best is not None and pays(text.method, best.cut, text.name.tokens, cp_size) else None


def _known(shelf: Shelf) -> list[tuple[Name, Entry | None]]:
    """Those on disk, then those in memory."""
    on_disk = {} if shelf.folder is None else shelf.folder.known
    stored: list[tuple[Name, Entry | None]] = [(on_disk[key], None) for key in sorted(on_disk.keys() - shelf.entries)]
    return stored + [(entry.name, entry) for entry in shelf.entries.values()]


def _common(text: Text, known: Name) -> int:
    """Tokens that both begin with: whole blocks, or all of the known text."""
    unit = unit_of(text.method, text.name.tokens)
    blocks = common_blocks(known.digests[:-1], text.name.digests[:-1])
    if blocks == len(known.digests) - 1 and known.tokens <= text.name.tokens:
        before = text.name.digests[blocks - 1] if blocks else text.root
        if end_digest(before, text.ids[blocks * unit : known.tokens], known.tokens) == known.digests[-1]:
            return known.tokens
    return blocks * unit
