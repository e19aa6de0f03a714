"""Star with a summary of the context in the anchor's place: a sink, and of every block the chunks with the rarest
tokens.

After the idea of Pulsar Attention (arXiv 2607.20457): the first block's tokens are a content-blind anchor, so a short
sink prefix is kept of them, and chunks that are chosen by inverse document frequency from all blocks take the rest of
the anchor's tokens. What differs here, and may differ from the paper in more than this:

- Position ids are kept, and a block sees the sink and the chunks of blocks *before* it only, as a causal model has been
  trained to. So every block sees more of the summary than the one before it, and the last block gives none.
- Every block but the last gives equally many chunks (to one), so work and messages follow from lengths alone, and only
  where the chunks lie follows from the tokens.

The summary's tokens run through the layers once, beside block 0, causally among themselves; their K/V go to the other
blocks as star's shared anchor does, and are not cached: block and decode are those of star. Which chunks are chosen
depends on the whole context, so a context that goes on is encoded anew, and none starts from another's K/V.
"""

from __future__ import annotations

from nemo_star.methods.method import CountedBlock, Method
from nemo_star.methods.partition import Block, Span, length, triangle
from nemo_star.methods.star import Star

DEFAULT_SHARE = 4
"""A block's tokens over the summary's."""


class Summary(Star):
    """Prefill anchored in a summary. `Block.sees` are tokens of the summary, its first ones; those of block 0, all of
    them, run through the layers beside it."""

    kind = "summary"
    attention = "nemo_star.attention.summary:SummaryAttention"
    takes_windows = False
    variants = ()
    ablates_anchor = False
    overlaps = False
    with_windows = Method.with_windows  # type: ignore[assignment]

    @property
    def shares_anchor(self) -> bool:
        return True

    def resized(self, block_size: int) -> Summary:
        return Summary(self._settings_of(block_size, None))

    def sizes(self, context_tokens: int) -> tuple[int, int]:
        """(block size, tokens of the summary): the sink and whole chunks within `attention.anchor_size`."""
        settings = self.settings
        block_size, budget = super().sizes(context_tokens)
        if settings.anchor_size is None:
            budget = -(-block_size // DEFAULT_SHARE)
        sink = min(settings.sink_size, budget)
        return block_size, sink + (budget - sink) // settings.chunk_size * settings.chunk_size

    def sink(self, context_tokens: int) -> int:
        """Tokens of the sink."""
        return min(self.settings.sink_size, self.sizes(context_tokens)[1])

    def chunks_before(self, index: int, context_tokens: int) -> int:
        """Chunks of the summary that are taken from the blocks before this one."""
        chunks = (self.sizes(context_tokens)[1] - self.sink(context_tokens)) // self.settings.chunk_size
        givers = self.num_blocks(context_tokens, 1) - 1
        return -(-min(index, givers) * chunks // givers) if givers else 0

    def goes_on_from(self, context_tokens: int) -> int:
        """The start: which chunks are chosen depends on what follows."""
        return 0

    def describe(self, context_tokens: int) -> str:
        block_size, summary = self.sizes(context_tokens)
        sink, blocks = self.sink(context_tokens), self.num_blocks(context_tokens, 1)
        chunks = self.chunks_before(blocks, context_tokens)
        of = f"{sink} at the start and {chunks} chunks of {self.settings.chunk_size}"
        return f"{blocks} blocks of {block_size} tokens, summary of {summary} tokens ({of})"

    def in_flight(self, block: Block) -> tuple[Span, ...]:
        """The block; before block 0 the whole summary, counted as if it were the context's first tokens."""
        return block.spans if block.index else (*block.sees, *block.spans)

    def pairs(self, block: Block) -> int:
        """Causal in itself, and all that it sees of the summary; block 0: causal in the summary, too."""
        seen = length(block.sees)
        return triangle(block.tokens) + (block.tokens * seen if block.index else triangle(seen))

    # Each block sees more than the one before it: all of them differ.

    def ranks_to_plan(self, context_tokens: int, cp_size: int) -> list[int]:
        """Also the last rank but one: the last may have nothing but a short block."""
        return sorted({*super().ranks_to_plan(context_tokens, cp_size), max(0, cp_size - 2)})

    def _counted(self, context_tokens: int, numbers: range) -> list[CountedBlock]:
        return [(self._block(number, context_tokens), 1) for number in numbers]

    def _block(self, index: int, context_tokens: int) -> Block:
        block_size, summary = self.sizes(context_tokens)
        start = index * block_size
        if index:
            summary = self.sink(context_tokens) + (self.chunks_before(index, context_tokens) * self.settings.chunk_size)
        elif self.num_blocks(context_tokens, 1) == 1:
            summary = 0
        return Block(index, ((start, min(start + block_size, context_tokens)),), ((0, summary),) if summary else ())
