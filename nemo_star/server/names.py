"""Contexts by name: who has which, how far they are, what is left of them after a restart."""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_star.contexts.in_use import context_key
from nemo_star.runtime.files import write_whole
from nemo_star.runtime.launch import warn
from nemo_star.server.events import Encoded, Progress

_FOLDER = "names"
"""In the store's folder; its own contexts lie in folders named by digests."""


@dataclass
class NamedContext:
    """A context that a user gave, and its state."""

    id: str
    name: str | None
    owner: str
    ids: array[int]
    """[tokens]; the K/V of a context that left the memory are computed again from these."""
    created: float
    """Seconds since 1970."""
    ttl_seconds: float | None
    used: float = field(default_factory=time.time)
    status: str = "queued"
    """queued, encoding, ready, failed; stored: of an earlier process, read or encoded again when it is asked for."""
    progress: Progress | None = None
    encoded: Encoded | None = None
    error: str | None = None
    uses: int = 0
    """Requests under way that came after it."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Time in which it does not expire; its own time begins anew at the end."""
        self.uses += 1
        try:
            yield
        finally:
            self.uses -= 1
            self.used = time.time()

    @functools.cached_property
    def key(self) -> bytes:
        """Of its text; a long one takes its time, and all of an owner's are compared when one is deleted."""
        return context_key(self.ids)

    @property
    def expires(self) -> float | None:
        """Seconds since 1970."""
        return None if self.ttl_seconds is None else self.used + self.ttl_seconds

    @property
    def public(self) -> dict[str, Any]:
        """What its owner is told."""
        told: dict[str, Any] = {
            "id": self.id,
            "object": "context",
            "name": self.name,
            "status": self.status,
            "tokens": len(self.ids),
            "created": int(self.created),
            "expires": None if self.expires is None else int(self.expires),
            "progress": None if self.progress is None else progress_fields(self.progress),
            "error": self.error,
        }
        if self.encoded is not None:
            told["cached_tokens"] = self.encoded.found_tokens
            told["prefill_seconds"] = self.encoded.prefill_seconds
            told["stored"] = self.encoded.kept
            told["warning"] = self.encoded.warning
        return told


def progress_fields(progress: Progress) -> dict[str, Any]:
    """A context's progress in JSON."""
    done, count = progress.blocks
    return {
        "blocks_done": done,
        "blocks": count,
        "by_cp_rank": [{"blocks_done": done, "blocks": count} for done, count in progress.done_by_rank],
        "seconds": round(progress.seconds, 3),
        "seconds_left": None if progress.seconds_left is None else round(progress.seconds_left, 3),
    }


class Names:
    """The named contexts of all owners.

    Args:
        folder: of the store of contexts: names are kept there, too, and found again; None: they end with the process.

    Raises:
        OSError: the folder cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / _FOLDER
        self._contexts: dict[tuple[str, str], NamedContext] = {}
        self._ids: dict[tuple[str, str], str] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(self._folder.glob("*/*.json")):
                self._read(file)

    def add(self, owner: str, name: str | None, ids: array[int], ttl_seconds: float | None) -> NamedContext:
        """A new one.

        Raises:
            ValueError: the owner has one of this name.
            OSError: it cannot be written down.
        """
        if name is not None and self.find(owner, name) is not None:
            raise ValueError(f"there is a context named {name!r}: delete it first, or take another name")
        identity = f"ctx_{secrets.token_hex(12)}"
        context = NamedContext(identity, name, owner, ids, time.time(), ttl_seconds)
        self._write(context)
        self._put(context)
        return context

    def find(self, owner: str, name: str) -> NamedContext | None:
        """By id or name, among the owner's own."""
        return self._contexts.get((owner, self._ids.get((owner, name), name)))

    def of(self, owner: str) -> list[NamedContext]:
        """The owner's, oldest first."""
        return [context for (whose, _), context in self._contexts.items() if whose == owner]

    def remove(self, context: NamedContext) -> bool:
        """Forget one; whether the owner has no other with the same text."""
        self._contexts.pop((context.owner, context.id), None)
        if context.name is not None:
            self._ids.pop((context.owner, context.name), None)
        if self._folder is not None:
            for file in self._files(context):
                file.unlink(missing_ok=True)
        return all(other.key != context.key for other in self.of(context.owner))

    def expired(self) -> Iterator[NamedContext]:
        """Those whose time is over, and that nobody encodes or uses now."""
        now = time.time()
        for context in list(self._contexts.values()):
            is_idle = context.status in ("ready", "failed", "stored") and not context.uses
            if is_idle and context.expires is not None and context.expires <= now:
                yield context

    def _put(self, context: NamedContext) -> None:
        self._contexts[context.owner, context.id] = context
        if context.name is not None:
            self._ids[context.owner, context.name] = context.id

    def _files(self, context: NamedContext) -> tuple[Path, Path]:
        assert self._folder is not None
        place = self._folder / hashlib.sha256(context.owner.encode()).hexdigest()[:32]
        return place / f"{context.id}.json", place / f"{context.id}.ids"

    def _write(self, context: NamedContext) -> None:
        """The tokens first: what has a record is complete."""
        if self._folder is None:
            return
        record, ids = self._files(context)
        record.parent.mkdir(exist_ok=True)
        values = {name: getattr(context, name) for name in ("id", "name", "owner", "created", "ttl_seconds")} | {
            "tokens": len(context.ids)
        }
        try:
            write_whole(ids, lambda file: file.write_bytes(context.ids.tobytes()))
            write_whole(record, lambda file: file.write_text(json.dumps(values), encoding="utf-8"))
            for file in (ids, record):
                file.chmod(0o600)
        except OSError:  # a disk that is full is not left fuller
            for file in (record, ids):
                file.unlink(missing_ok=True)
            raise

    def _read(self, file: Path) -> None:
        """One of an earlier process; what is not whole is left where it is, and said."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            ids = array("i", file.with_suffix(".ids").read_bytes())
            if len(ids) != values.pop("tokens"):
                raise ValueError("its tokens are not all there")
            self._put(NamedContext(ids=ids, status="stored", **values))
        except (OSError, ValueError, TypeError, KeyError) as error:
            warn(f"the named context in {file} cannot be read and is left out: {error}")
