"""A method that the package does not know: blocks that see a window of the context before them, dealt out in turn."""

from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, Partition, length, triangle

WINDOW = 8


class SlidingWindow(Method):
    """The window's tokens run through the layers again with each block, whose K/V alone are kept."""

    kind = "toy_method.SlidingWindow"
    attention = "toy_attention:WindowAttention"
    exact = False
    has_blocks = True

    def sizes(self, context_tokens):
        return min(self.settings.block_size or 32, context_tokens), 0

    def partition(self, context_tokens, cp_size):
        block_size, _ = self.sizes(context_tokens)
        blocks = [
            Block(index, ((start, min(start + block_size, context_tokens)),), ((max(0, start - WINDOW), start),))
            for index, start in enumerate(range(0, context_tokens, block_size))
        ]
        return Partition(context_tokens, tuple(tuple(blocks[rank::cp_size]) for rank in range(cp_size)))

    def in_flight(self, block):
        return (*block.sees, *block.spans)

    def pairs(self, block):
        return triangle(length(block.sees) + block.tokens)
