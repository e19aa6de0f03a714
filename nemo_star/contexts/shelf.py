"""The contexts in memory, within a budget: who goes when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from nemo_star.contexts.folder import ContextFolder, Name
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.encoding import Encoding
from nemo_star.runtime.launch import warn


@dataclass
class Entry:
    """A context in memory."""

    name: Name
    context: EncodedContext
    ids: Tensor
    """The context's own: another object when it has gone on."""
    size: int
    """Bytes on the fullest rank."""
    pins: int = 0


@dataclass
class UnderWay:
    """A context that is being encoded."""

    encoding: Encoding
    size: int
    """Bytes that it will come to."""
    set_aside: bool = False
    """Nobody waits for it now."""


class Shelf:
    """All ranks of a replica call the same methods in the same order.

    Args:
        budget_bytes: of contexts on the shelf and under way.
        folder: where those go that leave it; None: nowhere.
    """

    def __init__(self, budget_bytes: int, folder: ContextFolder | None) -> None:
        self.budget_bytes = budget_bytes
        self.folder = folder
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        """By key, the least recently used one first."""
        self.under_way: dict[str, UnderWay] = {}

    @property
    def used_bytes(self) -> int:
        entries = sum(entry.size for entry in self.entries.values())
        return entries + sum(under_way.size for under_way in self.under_way.values())

    def put(self, name: Name, context: EncodedContext, size: int) -> None:
        """Put a context where room was made, as the one that was used last."""
        self.entries[name.key] = Entry(name, context, context.ids, size)

    def find(self, context: EncodedContext) -> Entry | None:
        return next((entry for entry in self.entries.values() if entry.context is context), None)

    def make_room(self, size: int, *, staying: Entry | None = None) -> bool:
        """Let contexts go until `size` bytes are free, first those under way that nobody waits for, then the least
        recently used ones; whether they are. Pinned ones stay, and `staying`; where that is too much, all stay."""
        movable = [entry for entry in self.entries.values() if not entry.pins and entry is not staying]
        aside = [key for key, under_way in self.under_way.items() if under_way.set_aside]
        least = sum(entry.size for entry in movable) + sum(self.under_way[key].size for key in aside)
        if self.used_bytes - least + size > self.budget_bytes:
            return False
        for key in aside:
            if self.used_bytes + size <= self.budget_bytes:
                break
            self.under_way.pop(key).encoding.abandon()
        for entry in movable:
            if self.used_bytes + size <= self.budget_bytes:
                break
            self.take_away(entry)
        return True

    def take_away(self, entry: Entry) -> None:
        """Let a context go: to disk, where there is a folder."""
        del self.entries[entry.name.key]
        if self.folder is None:
            return
        try:
            self.folder.save(entry.name, entry.context)
        except ValueError as error:
            warn(f"{error}; it is encoded again when it is asked for")

    def leave_changed(self) -> None:
        """Contexts that have gone on, or are about to, are not what they were kept as."""
        for key, entry in list(self.entries.items()):
            if entry.context.ids is not entry.ids:
                del self.entries[key]
