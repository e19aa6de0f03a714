"""One request through the model: encode the context, encode the query, decode. Knows token ids, not text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention import AttentionState, SharedAnchor
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import PARTITIONS, Block, Partition
from nemo_star.models.stage import Stage
from nemo_star.parallel.groups import Groups, gather_objects

MOST_RESERVED_TOKENS = 4096
"""Room kept for query and answer from the start; an answer seldom takes all the tokens that it may."""

Choose = Callable[[Tensor], tuple[int, bool]]
"""Logits [vocab] float32 -> (token, whether it ends the answer). Asked on the replica's first rank only."""


@dataclass(frozen=True)
class Prefill:
    """What encoding a context took."""

    seconds: float
    """Wall time of the slowest rank."""
    kv_tokens_per_cp_rank: list[int]


@dataclass(frozen=True)
class Step:
    """One generated token; on the replica's first rank, the logits [vocab] float32 it was chosen from."""

    token: int
    logits: Tensor | None


class Engine:
    """Runs requests one after another; all ranks of a replica call the same methods with the same requests.

    Args:
        stage: this rank's part of the model.
        state: what the model's attention layers were built with.
    """

    def __init__(self, stage: Stage, state: AttentionState, groups: Groups, attention: AttentionConfig) -> None:
        self.stage = stage
        self.state = state
        self.groups = groups
        self.attention = attention
        self.device, self.dtype = stage.device, stage.dtype
        self._kv_tokens: list[int] = []  # by cp rank; grows as new tokens are dealt out
        self.anchor_wait_seconds = 0.0
        """Of the last prefill, spent on waiting for the shared anchor's K/V (CPU; a GPU waits in its own queue)."""
        self._prefilled = 0, 0.0  # tokens cached here by the last prefill, and its seconds on this rank

    def describe(self) -> str:
        """How it computes, for a person."""
        decode = "replicated" if self.state.decode_group is None else "sharded"
        over = f", decode {decode}" if self.groups.cp.size() > 1 else ""
        return f"kernel {self.state.kernel.name}, {str(self.dtype).removeprefix('torch.')}{over}"

    def partition(self, context_tokens: int) -> Partition:
        """How a context of this length is cut and dealt out."""
        block_size, anchor_size = self.attention.sizes(context_tokens)
        return PARTITIONS[self.attention.kind](context_tokens, block_size, anchor_size, self.groups.cp.size())

    @torch.inference_mode()
    def encode_context(
        self, context_ids: Sequence[int], *, new_tokens: int, on_block: Callable[[], None] = lambda: None
    ) -> None:
        """Phase 1: fill the cache with the context's K/V. Ranks exchange nothing but what their attention needs.

        Args:
            context_ids: the whole context, on every rank.
            new_tokens: query and generated tokens to keep room for.
            on_block: called after each of this rank's blocks.
        """
        started = time.perf_counter()
        self.anchor_wait_seconds = 0.0
        partition = self.partition(len(context_ids))
        ids = torch.tensor(context_ids, device=self.device)
        cp_rank = self.groups.cp.rank()
        self.state.cache.reset(partition.tokens_of(cp_rank) + min(new_tokens, MOST_RESERVED_TOKENS))
        self.state.cache.reserve(self.stage.layer_numbers, self.stage.kv_shape)
        self.state.partition = partition
        self.state.anchor = anchor = self._shared_anchor(partition)
        for block in partition.ranks[cp_rank]:
            self._encode_block(ids, block)
            on_block()
        if anchor is not None:
            anchor.finish()
            self.anchor_wait_seconds = anchor.waited_seconds
        self.state.partition = self.state.anchor = None
        self.synchronize()
        self._kv_tokens = [partition.tokens_of(rank) for rank in range(len(partition.ranks))]
        self._prefilled = self.state.cache.tokens, time.perf_counter() - started

    def prefill_report(self) -> Prefill:
        """What the last prefill took on all ranks of the replica, which all ask."""
        tokens, seconds = self._prefilled
        reports = gather_objects((self.groups.cp.rank(), tokens, seconds), self.groups.replica)
        held = {rank: tokens for rank, tokens, _ in reports}
        return Prefill(max(seconds for *_, seconds in reports), [held[rank] for rank in range(len(held))])

    @torch.inference_mode()
    def generate(self, query_ids: Sequence[int], *, tokens_to_generate: int, choose: Choose | None) -> Iterator[Step]:
        """Phase 2: encode the query, then decode token by token, until `choose` ends it or the number is reached.

        `choose` is asked on the replica's first rank; the others may give None.
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
        pieces = block.pieces
        if block.anchor_size and self.state.anchor is None:
            pieces = ((0, block.anchor_size), *pieces)
        positions = torch.cat([torch.arange(start, stop, device=self.device) for start, stop in pieces])
        self.state.block = block
        self.stage.encode(context_ids[positions], positions)

    def _shared_anchor(self, partition: Partition) -> SharedAnchor | None:
        """What hands the anchor's K/V round, where later blocks want it; None where each computes its own."""
        if self.attention.kind != "star" or self.attention.anchor != "shared":
            return None
        if partition.anchor_size == 0 or partition.num_blocks == 1:
            return None
        return SharedAnchor(
            self.groups.cp,
            self.stage.kv_shape,
            tokens=partition.anchor_size,
            layer_numbers=self.stage.layer_numbers,
            blocks_left=sum(block.index > 0 for block in partition.ranks[self.groups.cp.rank()]),
        )

    def _decode(self, tokens: Sequence[int], position: int) -> Tensor | None:
        """Logits [vocab] after `tokens`, which start at `position`; their K/V go to the least loaded cp rank."""
        owner = self._kv_tokens.index(min(self._kv_tokens))
        self._kv_tokens[owner] += len(tokens)
        self.state.block = None
        self.state.caches_new_tokens = owner == self.groups.cp.rank()
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.arange(position, position + len(tokens), device=self.device)
        logits = self.stage.next_token_logits(ids, positions)
        if self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0 and (self.stage.is_first or self.stage.is_last):
            logits = self.stage.logits_to_first(logits)
        return logits if self.groups.replica.rank() == 0 else None

    def _agree(self, logits: Tensor | None, choose: Choose | None) -> tuple[int, bool]:
        """The first rank's choice, on every rank: machines may round differently, and all must stop together."""
        choice = torch.zeros(2, dtype=torch.int64, device=self.device)
        if logits is not None:
            assert choose is not None
            token, ended = choose(logits)
            choice[0], choice[1] = token, int(ended)
        if self.groups.replica.size() > 1:
            dist.broadcast(choice, group=self.groups.replica, group_src=0)
        token, ended = choice.tolist()
        return token, bool(ended)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
