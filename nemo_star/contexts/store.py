"""Contexts that are kept between questions, within a budget: the least recently used ones go to disk and come back.

A text that is known is not encoded again, and one that begins as a known one does starts from its K/V (`prefix.py`).
Known are texts with the same weights, types and settled settings of the method: where `attention.block_size` is not
set, the size of a block follows from a text's length, so texts of other lengths have other blocks and share none, until
they are long enough for the largest default size.

All ranks of a replica call the same methods with the same arguments in the same order; what is kept, and what goes,
follows from that alone, and no rank looks at a clock or at its own free memory.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from pathlib import Path

import torch
from torch import Tensor

from nemo_star.contexts.accounting import KVBytes
from nemo_star.contexts.fingerprint import block_digests, owner_digest, root_digest, unit_of
from nemo_star.contexts.folder import ContextFolder, Name
from nemo_star.contexts.prefix import first_tokens, gone_on, start_from
from nemo_star.contexts.shelf import Shelf, UnderWay
from nemo_star.contexts.start import Text, longest_start
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.encoding import Encoding
from nemo_star.engine.engine import Engine
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition, clipped, length
from nemo_star.runtime.launch import warn


class ContextStore:
    """The contexts of one replica.

    Args:
        engine: encodes them.
        budget_bytes: of K/V on the fullest rank, of all contexts that are kept or being encoded. Sequences' own K/V,
            and the spare room of contexts that grew past their plan, come on top.
        fingerprint: of the weights (`weights_fingerprint`).
        folder: where those go that do not fit, on all machines the same one; None: they are dropped.
        salt: stores with another one find nothing of this one's in the folder.

    Raises:
        ValueError: on all ranks alike: a budget below 1 byte, a folder that cannot be made.
    """

    def __init__(
        self, engine: Engine, *, budget_bytes: int, fingerprint: str, folder: Path | None = None, salt: str = ""
    ) -> None:
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes={budget_bytes}: a store of contexts needs at least 1 byte")
        self._engine = engine
        self._fingerprint = fingerprint
        self._salt = salt
        self._bytes = KVBytes(engine)
        self._folder = None if folder is None else ContextFolder(engine, folder, fingerprint=fingerprint)
        self._shelf = Shelf(budget_bytes, self._folder)

    @property
    def used_bytes(self) -> int:
        """Of the budget, on the fullest rank."""
        return self._shelf.used_bytes

    @property
    def budget_bytes(self) -> int:
        """Of the fullest rank."""
        return self._shelf.budget_bytes

    @property
    def token_bytes(self) -> int:
        """Of one token's K/V, on the rank that has most layers."""
        return self._bytes.token

    @property
    def tokens_by_rank(self) -> list[int]:
        """Tokens of all contexts in memory, by cp rank."""
        held = [entry.context.partition.tokens_by_rank for entry in self._shelf.entries.values()]
        return [sum(tokens) for tokens in zip([0] * self._cp_size, *held, strict=True)]

    @property
    def contexts(self) -> int:
        """In memory, complete."""
        return len(self._shelf.entries)

    def check_size(self, tokens: int) -> None:
        """Refuse a context that the budget does not take, whatever else is kept.

        Raises:
            ValueError: names the numbers.
        """
        self._check(tokens, self._whole(self._engine.method.pinned(tokens), tokens))

    def open(self, ids: Ids[int] | Tensor, *, owner: str = "") -> EncodedContext | Encoding | None:
        """The context of a text: as it is known, or on its way.

        Args:
            ids: [tokens], the whole text.
            owner: contexts of one owner are never found by another.

        Returns:
            a context, in memory or loaded from disk: `pin` it before the next call of the store, which may let it go.
            Or what encodes it, from the longest beginning that is known: take all its steps, then `keep` its context;
            asked for the text before that, the store gives the same one again. None: there is no room beside what is
            pinned or under way now.

        Raises:
            ValueError: no tokens, or more than the budget takes.
        """
        shelf = self._shelf
        shelf.leave_changed()
        tokens = torch.as_tensor(ids, dtype=torch.int32)
        if not len(tokens):
            raise ValueError("a context of 0 tokens: give at least 1")
        text = self._text(tokens, self._engine.method.pinned(len(tokens)), owner)
        key = text.name.key
        if key in shelf.entries:
            shelf.entries.move_to_end(key)
            return shelf.entries[key].context
        if key in shelf.under_way:
            shelf.under_way[key].set_aside = False
            return shelf.under_way[key].encoding
        size = self._whole(text.method, len(tokens))
        self._check(len(tokens), size)
        if self._folder is not None and self._folder.has(text.name):
            if not shelf.make_room(size):
                return None
            context = self._load(text.name)
            if context is not None:
                shelf.put(text.name, context, size)
                return context
        started = self._started(text)
        if started is None and shelf.make_room(size):
            return self._on_its_way(text.name, self._engine.begin(tokens), size)
        return started

    def find(self, ids: Ids[int] | Tensor, *, owner: str = "") -> EncodedContext | None:
        """The context of a text, where it is in memory."""
        self._shelf.leave_changed()
        tokens = torch.as_tensor(ids, dtype=torch.int32)
        key = self._text(tokens, self._engine.method.pinned(len(tokens)), owner).name.key
        if key not in self._shelf.entries:
            return None
        self._shelf.entries.move_to_end(key)
        return self._shelf.entries[key].context

    def set_aside(self, context: EncodedContext) -> None:
        """Nobody waits for what is under way of a context any more: it stays, to go on with when it is asked for again,
        until its memory is wanted."""
        for under_way in self._shelf.under_way.values():
            if under_way.encoding.context is context:
                under_way.set_aside = True

    def keep(self, context: EncodedContext, *, owner: str = "") -> bool:
        """Keep a complete context: one that `open` began, or another one, or one that has gone on since it was kept.

        Args:
            owner: as it was opened for.

        Returns:
            whether it is kept: not if it does not fit beside what is pinned now, or the same text is kept already.
        """
        self._shelf.leave_changed()
        self._forget_under_way(context)
        name = self._text(context.ids, context.method, owner).name
        if name.key in self._shelf.entries:
            return self._shelf.entries[name.key].context is context
        self._trim(context)
        size = self._bytes.fullest(context.partition, context.method)
        if not self._shelf.make_room(size):
            return False
        self._shelf.put(name, context, size)
        return True

    def pin(self, context: EncodedContext) -> None:
        """Sequences hang on it from now on: it stays in memory until `release` was called as often.

        Raises:
            ValueError: the store does not have it in memory.
        """
        entry = self._shelf.find(context)
        if entry is None:
            raise ValueError("this context is not in the store: keep it first")
        entry.pins += 1

    def release(self, context: EncodedContext) -> None:
        """The end of one `pin`; of a context that has left the store since, nothing."""
        entry = self._shelf.find(context)
        if entry is not None:
            entry.pins = max(0, entry.pins - 1)

    def reserve(self, tokens: int) -> bool:
        """Make room for a context of this length; whether there is room now. Where pinned contexts are in the way, all
        stay."""
        self._shelf.leave_changed()
        return self._shelf.make_room(self._whole(self._engine.method.pinned(tokens), tokens))

    def forget(self, context: EncodedContext) -> None:
        """Drop a context, or what is under way of it, from memory and from disk; also before it goes on
        (`Engine.extend`), which changes it under those who find it."""
        self._forget_under_way(context)
        entry = self._shelf.find(context)
        if entry is not None:
            del self._shelf.entries[entry.name.key]
            if self._folder is not None:
                self._folder.remove(entry.name)

    def save(self, context: EncodedContext) -> bool:
        """Bring a kept context to disk now, so that it outlives this process; whether there is a folder for it.

        Raises:
            ValueError: on all ranks alike: it is not kept, the disk is full.
        """
        entry = self._shelf.find(context)
        if entry is None:
            raise ValueError("this context is not in the store: keep it first")
        if self._folder is None:
            return False
        self._folder.save(entry.name, entry.context)
        return True

    def forget_text(self, ids: Ids[int] | Tensor, *, owner: str = "") -> None:
        """Drop the context of a text, and what nobody waits for of one under way, from memory and from disk; sequences
        that hang on it may go on."""
        tokens = torch.as_tensor(ids, dtype=torch.int32)
        name = self._text(tokens, self._engine.method.pinned(len(tokens)), owner).name
        self._shelf.entries.pop(name.key, None)
        under_way = self._shelf.under_way.get(name.key)
        if under_way is not None and under_way.set_aside:
            under_way.encoding.abandon()
            del self._shelf.under_way[name.key]
        if self._folder is not None:
            self._folder.remove(name)

    def forget_owner(self, owner: str) -> None:
        """Drop all contexts of an owner, those on disk of earlier processes, too."""
        digest, entries = owner_digest(self._salt, owner), self._shelf.entries
        for key in [key for key, entry in entries.items() if entry.name.owner == digest]:
            del entries[key]
        if self._folder is not None:
            self._folder.remove_owner(digest)

    def close(self) -> None:
        """Bring all contexts to disk, where there is a folder, and let go of them."""
        self._shelf.leave_changed()
        for entry in list(self._shelf.entries.values()):
            self._shelf.take_away(entry)
        self._shelf.under_way.clear()

    @property
    def _cp_size(self) -> int:
        return self._engine.groups.cp.size()

    def _text(self, ids: Tensor, method: Method, owner: str) -> Text:
        types = [str(self._engine.dtype), str(self._engine.state.cache_dtype)]
        root = root_digest(self._fingerprint, method, owner=owner, parts=[self._salt, *types])
        digests = block_digests(root, ids, unit_of(method, len(ids)))
        return Text(ids, method, root, Name(owner_digest(self._salt, owner), tuple(digests), len(ids)))

    def _whole(self, method: Method, tokens: int) -> int:
        """Bytes of a context that is encoded, or loaded, as a whole."""
        return self._bytes.fullest(method.partition(tokens, self._cp_size), method)

    def _check(self, tokens: int, size: int) -> None:
        if size > self._shelf.budget_bytes:
            raise ValueError(
                f"a context of {tokens} tokens takes {size} bytes on the fullest rank, more than the budget of "
                f"{self._shelf.budget_bytes}: give a shorter one, or a larger budget_bytes"
            )

    def _trim(self, context: EncodedContext) -> None:
        """Windowed layers of a context that went on token by token hold more than anybody will look at."""
        stage = self._engine.stage
        spans = context.partition.spans_of(self._engine.groups.cp.rank())
        near = clipped(spans, context.method.windowed_from(context.tokens, stage.window), context.tokens)
        context.cache.keep_last(stage.windowed_layer_numbers, length(near))

    def _forget_under_way(self, context: EncodedContext) -> None:
        under_way = self._shelf.under_way
        for key in [key for key, each in under_way.items() if each.encoding.context is context]:
            del under_way[key]

    def _on_its_way(self, name: Name, encoding: Encoding, size: int) -> Encoding:
        self._shelf.under_way[name.key] = UnderWay(encoding, size)
        return encoding

    def _load(self, name: Name, partition: Partition | None = None) -> EncodedContext | None:
        """From disk; None where it cannot be read, and is encoded again."""
        assert self._folder is not None
        try:
            return self._folder.load(name, partition)
        except ValueError as error:
            warn(f"{error}; it is encoded again")
            self._folder.remove(name)
            return None

    def _started(self, text: Text) -> EncodedContext | Encoding | None:
        """From the K/V of a known context that begins alike; None: there is none, or no room to start from it."""
        engine, shelf, method, tokens = self._engine, self._shelf, text.method, len(text.ids)
        start = longest_start(shelf, text, has_windows=self._bytes.has_windows, cp_size=self._cp_size)
        if start is None:
            return None
        entry = start.entry
        dealt = method.partition(tokens, self._cp_size) if entry is None else entry.context.partition
        partition = first_tokens(dealt, start.cut)
        size = self._bytes.fullest(gone_on(method, partition, tokens), method)
        if entry is None:
            context = self._load(start.name, partition) if shelf.make_room(size) else None
        elif shelf.make_room(size, staying=entry):
            context = start_from(engine, entry.context, text.ids, start.cut, copies=True)
        elif shelf.make_room(size):  # which let the known one go: its memory becomes that of the new one
            context = start_from(engine, entry.context, text.ids, start.cut, copies=False)
        else:
            context = None
        if context is None:
            return None
        if start.cut == tokens:
            shelf.put(text.name, context, size)
            return context
        return self._on_its_way(text.name, engine.extend(context, text.ids[start.cut :]), size)
