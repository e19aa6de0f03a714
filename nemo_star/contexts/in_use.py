"""Contexts that questions hang on: each opened once for all who ask of it at the same time, in memory until the last of
them is done."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from hashlib import sha256

from nemo_star.contexts.store import ContextStore
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.encoding import Encoding
from nemo_star.engine.engine import Engine
from nemo_star.engine.scheduler import ContextWork


def context_key(ids: array[int]) -> bytes:
    """The same for the same tokens."""
    return sha256(ids.tobytes()).digest()


class ContextsInUse:
    """Works for a scheduler, over a store. All ranks of a replica call the same methods in the same order."""

    def __init__(self, engine: Engine, store: ContextStore) -> None:
        self.store = store
        self._engine = engine
        self._nothing = engine.empty_context()
        self._works: dict[tuple[str, bytes], ContextWork] = {}
        self._users: dict[tuple[str, bytes], int] = {}

    def work(
        self,
        ids: array[int],
        *,
        owner: str = "",
        key: bytes | None = None,
        on_block: Callable[[], None] = lambda: None,
    ) -> ContextWork:
        """The context of a text, for one more user, who ends with `let_go`.

        Args:
            ids: [tokens]; none: a query that hangs on nothing.
            key: `context_key(ids)`, where it is known.
        """
        name = owner, key or context_key(ids)
        work = self._works.get(name)
        if work is None or work.error is not None:
            # Who asks of what is there does not wait until others' texts are encoded.
            known = self.store.find(ids, owner=owner) if ids else self._nothing
            work = ContextWork(ids, owner, context=known, on_block=on_block)
            if known is None:
                work.on_encoded = lambda context: self._keep(context, owner)
            elif ids:
                work.found_tokens = known.tokens
                self.store.pin(known)
            self._works[name], self._users[name] = work, 0
        self._users[name] += 1
        return work

    def open(self, work: ContextWork) -> Encoding | EncodedContext | None:
        """For the scheduler: as `ContextStore.open`."""
        return self.store.open(work.ids, owner=work.owner)

    def open_even_alone(self, work: ContextWork, in_use: list[ContextWork]) -> Encoding | EncodedContext | None:
        """The same, where a context that is larger than the store's share may have all of the memory: it is encoded
        when nothing else is `in_use`, and not kept."""
        try:
            opened = self.open(work)
        except ValueError:
            opened = None
        others = any(other is not work for other in in_use)
        return opened if opened is not None or others else self._engine.begin(work.ids)

    def let_go(self, work: ContextWork) -> None:
        """One user is done with it; after the last one it may leave the memory."""
        name = next((name for name, other in self._works.items() if other is work), None)
        if name is None:
            return
        self._users[name] -= 1
        if self._users[name]:
            return
        del self._works[name], self._users[name]
        if work.context is not None:
            self.store.release(work.context)
        elif work.encoding is not None:
            self.store.set_aside(work.encoding.context)

    def _keep(self, context: EncodedContext, owner: str) -> None:
        """For the questions that hang on it, and for later ones."""
        if self.store.keep(context, owner=owner):
            self.store.pin(context)
