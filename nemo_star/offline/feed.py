"""Requests from rank 0 to whichever replica is free, and answers back.

Rank 0 reads ahead and lays out groups of requests that share a context; a replica with room takes the next one. Both go
through a store (the launcher's, where there are several replicas), so that no replica waits for another.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist

from nemo_star.offline.requests import BadRequest, Request
from nemo_star.offline.sink import Answer

READ_AHEAD_REQUESTS = 64
"""Looked through for requests that share a context."""
READ_AHEAD_TOKENS = 2**22
"""Of their contexts together, after which it is not read on."""
_REST_SECONDS = 0.005

Group = list[Request]
"""Requests on one context, in the order of the input."""


class Feed:
    """One side or the other, on the first rank of each replica.

    Args:
        replicas: that take groups.
    """

    def __init__(self, store: dist.Store, replicas: int) -> None:
        self._store = store
        self._replicas = replicas
        self._laid_out = 0
        self._ended = False
        self._drawn: int | None = None
        self.took_first = False
        """Whether the group taken last was the first of all."""

    def lay_out(self, read: Callable[[], Request | BadRequest | None]) -> None:
        """On rank 0: read on while few groups are left to take; `read` gives None after the last item."""
        while not self._ended and self._laid_out - self._store.add("drawn", 0) <= self._replicas:
            groups, self._ended = _grouped(read)
            for group in groups:
                _set(self._store, f"group/{self._laid_out}", group)
                self._laid_out += 1
            if self._ended:
                self._store.set("groups", str(self._laid_out))

    def answers(self, indices: Iterable[int]) -> list[Answer]:
        """On rank 0: the answers to these requests as far as they have come, in a row."""
        found: list[Answer] = []
        for index in indices:
            key = f"answer/{index}"
            if not self._store.check([key]):
                break
            found.append(pickle.loads(self._store.get(key)))
            self._store.delete_key(key)
        return found

    def fail(self, message: str) -> None:
        """On rank 0: have every replica end when it asks for more."""
        self._store.set("failed", message)

    def take(self, *, wait: bool) -> Group | None:
        """The next group, None after the last; an empty one where none is laid out yet and the caller does not wait.

        Raises:
            ValueError: rank 0 has failed.
        """
        if self._drawn is None:
            self._drawn = self._store.add("drawn", 1) - 1
        key = f"group/{self._drawn}"
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise ValueError(self._store.get("failed").decode())
            if self._store.check(["groups"]) and self._drawn >= int(self._store.get("groups")):
                return None
            if not wait:
                return []
            time.sleep(_REST_SECONDS)
        group: Group = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        self.took_first, self._drawn = self._drawn == 0, None
        return group

    def give(self, index: int, answer: Answer) -> None:
        """The answer to the request in this place of the input."""
        _set(self._store, f"answer/{index}", answer)


def _set(store: dist.Store, key: str, value: object) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # a string to its type hints, bytes to its code


def _grouped(read: Callable[[], Request | BadRequest | None]) -> tuple[list[Group], bool]:
    """The next requests by context, and whether these were the last."""
    groups: dict[bytes, Group] = {}
    requests = tokens = 0
    while requests < READ_AHEAD_REQUESTS and tokens < READ_AHEAD_TOKENS:
        item = read()
        if item is None:
            return list(groups.values()), True
        if isinstance(item, Request):
            group = groups.setdefault(item.context_key, [])
            tokens += 0 if group else len(item.context_ids)
            group.append(item)
            requests += 1
    return list(groups.values()), False
