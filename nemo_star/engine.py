"""One request through the model: encode the context, encode the query, decode. Knows token ids, not text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_star.attention import AttentionState
from nemo_star.config import AttentionConfig
from nemo_star.distributed import gather_objects
from nemo_star.model import StarGPTModel
from nemo_star.partition import Block, Partition

Choose = Callable[[Tensor], tuple[int, bool]]
"""Logits [vocab] float32 -> (token, whether it ends the answer). Called on the first cp rank only."""


@dataclass(frozen=True)
class Prefill:
    """What encoding a context took."""

    seconds: float
    """Wall time of the slowest cp rank."""
    kv_tokens_per_cp_rank: list[int]


@dataclass(frozen=True)
class Step:
    """One generated token, and the logits [vocab] float32 it was chosen from."""

    token: int
    logits: Tensor


class Engine:
    """Runs requests one after another on every rank of a replica; all ranks call the same methods."""

    def __init__(
        self, model: StarGPTModel, state: AttentionState, groups: ProcessGroupCollection, attention: AttentionConfig
    ) -> None:
        self.model = model
        self.state = state
        self.cp_group: dist.ProcessGroup = groups.cp
        self.attention = attention
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._kv_tokens: list[int] = []

    def partition(self, context_tokens: int) -> Partition:
        """How a context of this length is cut and dealt out."""
        block_size, anchor_size = self.attention.sizes(context_tokens)
        return Partition(context_tokens, block_size, anchor_size, self.cp_group.size())

    @torch.inference_mode()
    def encode_context(
        self, context_ids: Sequence[int], *, new_tokens: int, on_block: Callable[[], None] = lambda: None
    ) -> Prefill:
        """Phase 1: fill the cache with the context's K/V.

        Args:
            context_ids: the whole context, on every rank.
            new_tokens: query and generated tokens to keep room for.
            on_block: called after each of this rank's blocks.
        """
        partition = self.partition(len(context_ids))
        ids = torch.tensor(context_ids, device=self.device)
        cp_rank = self.cp_group.rank()
        self.state.cache.reset(partition.tokens_of(cp_rank) + new_tokens)
        dist.barrier(self.cp_group)
        started = time.perf_counter()
        for block in partition.blocks_of(cp_rank):
            self._encode_block(ids, block)
            on_block()
        self._synchronize()
        elapsed = time.perf_counter() - started
        reports = gather_objects((elapsed, self.state.cache.tokens), self.cp_group)
        self._kv_tokens = [tokens for _, tokens in reports]
        return Prefill(max(seconds for seconds, _ in reports), list(self._kv_tokens))

    @torch.inference_mode()
    def generate(self, query_ids: Sequence[int], *, tokens_to_generate: int, choose: Choose | None) -> Iterator[Step]:
        """Phase 2: encode the query, then decode token by token, until `choose` ends it or the number is reached.

        `choose` is asked on the first cp rank; the others may give None.
        """
        position = sum(self._kv_tokens)
        tokens = list(query_ids)
        for _ in range(tokens_to_generate):
            logits = self._decode(tokens, position)
            position += len(tokens)
            token, ended = self._agree(logits, choose)
            yield Step(token, logits)
            if ended:
                return
            tokens = [token]

    def _encode_block(self, context_ids: Tensor, block: Block) -> None:
        positions = torch.arange(block.start, block.stop, device=self.device)
        if block.anchor_size:
            positions = torch.cat((torch.arange(block.anchor_size, device=self.device), positions))
        self.state.block = block
        self.model.encode(context_ids[positions][None], positions[None])

    def _decode(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [vocab] after `tokens`, which start at `position`; their K/V go to the least loaded cp rank."""
        owner = self._kv_tokens.index(min(self._kv_tokens))
        self._kv_tokens[owner] += len(tokens)
        self.state.block = None
        self.state.caches_new_tokens = owner == self.cp_group.rank()
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.arange(position, position + len(tokens), device=self.device)
        return self.model.next_token_logits(ids[None], positions[None])[0]

    def _agree(self, logits: Tensor, choose: Choose | None) -> tuple[int, bool]:
        """The first cp rank's choice, on every rank: machines may round differently, and all must stop together."""
        choice = torch.zeros(2, dtype=torch.int64, device=self.device)
        if self.cp_group.rank() == 0:
            assert choose is not None
            token, ended = choose(logits)
            choice[0], choice[1] = token, int(ended)
        if self.cp_group.size() > 1:
            dist.broadcast(choice, group=self.cp_group, group_src=0)
        token, ended = choice.tolist()
        return token, bool(ended)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
