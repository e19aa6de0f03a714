"""Keys of `nemo-star evaluate`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from nemo_star.config.compare import Candidate
from nemo_star.config.generate import InferenceConfig
from nemo_star.config.llm import LLMConfig
from nemo_star.methods.config import AnchorContent, AnchorPositions, AttentionConfig
from nemo_star.methods.registry import method_class, method_of

_PART = re.compile(r"n/([1-9][0-9]*)")


@dataclass(frozen=True)
class Contender:
    """One way to attend, in a sweep: a word of `compare`, and sizes as they were given."""

    candidate: Candidate
    block_size: int | str | None = None
    anchor_size: int | str | None = None
    anchor: str | None = None
    """CONTENT[:POSITIONS]."""
    overlap_size: int | str | None = None

    @property
    def name(self) -> str:
        """As in reports: star n/4, star 2048 anchor 0, star:recompute n/4 anchor random, star n/4 overlap 64."""
        words = [word for word in (self.anchor_size, self.anchor) if word is not None]
        anchor = ["anchor", *words] if words else []
        block = [] if self.block_size is None else [self.block_size]
        overlap = [] if self.overlap_size is None else ["overlap", self.overlap_size]
        return " ".join(map(str, (self.candidate.word, *block, *anchor, *overlap)))

    def settings(self, attention: AttentionConfig, length: int) -> AttentionConfig:
        """The group `attention` for contexts of about this length."""
        changes = {"kind": self.candidate.kind}
        changes |= {"anchor": self.candidate.variant} if self.candidate.variant else {}
        changes |= {} if self.anchor is None else anchor_of(self.anchor)
        sizes = {"block_size": self.block_size, "anchor_size": self.anchor_size, "overlap_size": self.overlap_size}
        given = {name: size_of(size, length) for name, size in sizes.items() if size is not None}
        return replace(attention, **changes, **given)  # type: ignore[arg-type]


def anchor_of(word: str) -> dict[str, str]:
    """Keys of the group `attention` for CONTENT[:POSITIONS]; without positions, those of the first block.

    Raises:
        ValueError: it means nothing.
    """
    content, colon, positions = word.partition(":")
    contents, places = get_args(AnchorContent), get_args(AnchorPositions)
    if content not in contents or (colon and positions not in places):
        raise ValueError(
            f"anchors: {word!r} is unknown; known: {', '.join(contents)}, each with :{' or :'.join(places)} if wanted"
        )
    return {"anchor_content": content, "anchor_positions": positions or "first"}


def size_of(size: int | str, length: int) -> int:
    """Tokens of a size: a number, or a part of the length such as n/4 (rounded up).

    Raises:
        ValueError: it is neither.
    """
    if isinstance(size, int) and size >= 0:
        return size
    if (part := _PART.fullmatch(str(size))) is not None:
        return -(-length // int(part[1]))
    raise ValueError(f"a size is a number of tokens or a part of the length such as n/4, not {size!r}")


@dataclass(frozen=True)
class EvaluateConfig(LLMConfig):
    """All keys of `nemo-star evaluate`."""

    compare: tuple[str, ...] = ("dense", "star")
    """Attention methods, METHOD[:VARIANT]; differences are to the first one, sample by sample."""
    block_sizes: tuple[int | str, ...] = ()
    """Of methods that have blocks: each of these, in tokens or as a part of the length (n/4); none:
    attention.block_size."""
    anchor_sizes: tuple[int | str, ...] = ()
    """Of methods that have blocks: each of these with each block size that is no smaller; none:
    attention.anchor_size."""
    anchors: tuple[str, ...] = ()
    """Of star: what stands in the anchor's place, CONTENT[:POSITIONS] as of attention.anchor_content and
    attention.anchor_positions, with each size that is not 0; none: as these keys say."""
    overlap_sizes: tuple[int | str, ...] = ()
    """Of star: each of these with each block size that is no smaller; none: attention.overlap_size."""
    tasks: tuple[str, ...] = ("niah_single_1", "niah_multikey_2", "vt")
    """Of RULER; of BABILong: babilong_qa1 to babilong_qa5, with _offline behind without files; of InfiniteBench:
    passkey, number_string, kv_retrieval; mrcr_2, _4, _8 of openai/mrcr's file, mrcr_like_2, _4, _8 without."""
    lengths: tuple[int, ...] = (4096,)
    """Tokens of prompt and answer together."""
    samples: int = 200
    """Of each task at each length."""
    seed: int = 42
    """Of the samples."""
    variant: Literal["ruler", "star_paper"] = "ruler"
    """RULER's tasks as it has them, or as the code of the Star Attention paper has them."""
    chat: bool = False
    """Ask in the checkpoint's chat template, as RULER asks instruct models: the task is the user's turn, the answer's
    first words follow the assistant's header; the template's tokens count within the length."""
    data: str | None = None
    """Folder with the essays, questions, stories and books that some tasks need."""
    input: str | None = None
    """JSON lines {"id", "task", "context", "query", "outputs"} instead: given samples."""
    output: str | None = None
    """Folder for samples.jsonl, report.md, report.csv and pictures."""
    resume: bool = False
    """Go on where an earlier run with the same keys ended."""
    overwrite: bool = False
    """Replace what is in the folder."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is None:
            raise ValueError("output is not set: give output=FOLDER for the samples and the report")
        if self.chat_template:
            raise ValueError("chat_template=true would leave the answer's first words to the user: give chat=true")
        for name in ("compare", "lengths") if self.input else ("compare", "tasks", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        for name in ("compare", "tasks", "lengths", "block_sizes", "anchor_sizes", "anchors", "overlap_sizes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice: {', '.join(map(str, values))}")
        if min(self.lengths) < 64:
            raise ValueError(f"lengths holds {min(self.lengths)}: at least 64 tokens")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")
        for size in (*self.block_sizes, *self.anchor_sizes, *self.overlap_sizes):
            size_of(size, 1)
        for contender in self.contenders():
            method_of(contender.settings(self.attention, min(self.lengths)))

    def contenders(self) -> list[Contender]:
        """All ways to attend, those of one method next to each other.

        Raises:
            ValueError: a word of `compare` or `anchors` that means nothing.
        """
        found = []
        for word in self.compare:
            candidate = Candidate.parse(word)
            method = method_class(candidate.kind)
            blocks = self.block_sizes if method.has_blocks and self.block_sizes else (None,)
            sizes = self.anchor_sizes if method.has_blocks and self.anchor_sizes else (None,)
            anchors = self.anchors if method.ablates_anchor and self.anchors else (None,)
            overlaps = self.overlap_sizes if method.overlaps and self.overlap_sizes else (None,)
            of_word = [
                Contender(candidate, block, size, anchor, overlap)
                for block in blocks
                for size in sizes
                if self._fits(size, block)
                for anchor in (anchors if size != 0 else (None,))
                for overlap in overlaps
                if self._fits(overlap, block)
            ]
            if not of_word:
                raise ValueError(
                    f"compare: nothing is left of {word}, because no block of block_sizes is as large as one of "
                    "anchor_sizes and one of overlap_sizes"
                )
            found += of_word
        return found

    def _fits(self, size: int | str | None, block: int | str | None) -> bool:
        """Neither an anchor nor an overlap is larger than a block; those of a sweep that would be are left out."""
        if block is None or size is None:
            return True
        return all(size_of(size, length) <= size_of(block, length) for length in self.lengths)
