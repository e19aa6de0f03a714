"""An encoded context as a user of `LLM` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_star.attention.cache import KVCache
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.scheduler import ContextWork
from nemo_star.methods.partition import Partition
from nemo_star.text.ids import Text

if TYPE_CHECKING:
    from nemo_star.llm.front import LLM


class Book:
    """A context that was encoded once, to ask it many questions (`LLM.generate`), to talk about it (`LLM.converse`), to
    add to it, to keep it on disk. Made by `LLM.encode` and `LLM.load`; answering changes nothing in it.
    """

    def __init__(self, llm: LLM, encoded: EncodedContext) -> None:
        self.encoded = encoded
        self._llm = llm

    @property
    def tokens(self) -> int:
        """Length of the whole context."""
        return self.encoded.tokens

    @property
    def cache(self) -> KVCache:
        """K/V of this rank's share."""
        return self.encoded.cache

    @property
    def partition(self) -> Partition:
        """Which cp rank holds what."""
        return self.encoded.partition

    @property
    def seconds(self) -> float:
        """Encoding took on this rank."""
        return self.encoded.seconds

    def append(self, text: Text) -> None:
        """Add text, or token ids, at the end: the same as encoding the whole at the block size of the first part.

        Only new blocks are encoded; a short last one is encoded again with what fills it. Conversations about the book
        end with that.

        Raises:
            ValueError: an empty or unknown text or token, or a context that certainly does not fit.
        """
        self._llm.append(self, text)

    def save(self, folder: str | Path) -> None:
        """Keep it on disk, for `LLM.load`: a folder, which must be the same one on all machines. What was saved there
        before is replaced when all is written.

        Raises:
            ValueError, OSError: on all ranks alike: a folder that cannot be written.
        """
        self._llm.save(self, folder)

    def work(self) -> ContextWork:
        """For the scheduler."""
        return ContextWork(context=self.encoded)
