"""Pipeline stages: hidden states to the next stage, logits back to the first.

Plain send and receive over the pp group; Megatron's P2PCommunicator needs CUDA. Stages follow each other: while a stage
works on one block, the one before it is already at the next.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention import KVShape
from nemo_star.model import StarGPTModel


class Pipeline:
    """This rank's stage of a model. With one stage it is the model itself."""

    def __init__(self, model: StarGPTModel, pp_group: dist.ProcessGroup) -> None:
        self.model = model
        self.group = pp_group
        weight = next(model.parameters())
        self._empty = weight.new_empty(0)
        self._sending: tuple[dist.Work, Tensor] | None = None

    @property
    def is_first(self) -> bool:
        return self.group.rank() == 0

    @property
    def is_last(self) -> bool:
        return self.group.rank() == self.group.size() - 1

    @property
    def layer_numbers(self) -> list[int]:
        """Megatron's global, 1-based numbers of this stage's layers."""
        return [layer.layer_number for layer in self.model.decoder.layers]

    @property
    def kv_shape(self) -> KVShape:
        """What a layer's K looks like here, for one request."""
        config = self.model.config
        groups = config.num_query_groups // self.model.tp_group.size()
        return KVShape(1, groups, config.kv_channels, self._empty.dtype, self._empty.device)

    def encode(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Run this stage's layers for what they leave in the K/V cache; ids and positions [b, s]."""
        self._receive_hidden(input_ids)
        hidden = self.model.encode(input_ids, position_ids)
        self._send_hidden(hidden)

    def next_token_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """Logits [b, vocab] float32 after the last of input_ids [b, s]: on the last stage; None on the others."""
        self._receive_hidden(input_ids)
        if self.is_last:
            return self.model.next_token_logits(input_ids, position_ids)
        self._send_hidden(self.model.encode(input_ids, position_ids))
        return None

    def logits_to_first(self, logits: Tensor | None) -> Tensor:
        """The last stage's logits [b, vocab] on the first one (to be called on these two alone)."""
        if self.group.size() == 1 or self.is_last:
            assert logits is not None
            if not self.is_first:
                dist.send(logits, group=self.group, group_dst=0)
            return logits
        received = self._empty.new_empty((1, self.model.true_vocab_size), dtype=torch.float32)
        dist.recv(received, group=self.group, group_src=self.group.size() - 1)
        return received

    def _receive_hidden(self, input_ids: Tensor) -> None:
        """Take [s, b, h] from the stage before, whose token ids are known here too."""
        if self.is_first:
            return
        batch, tokens = input_ids.shape
        hidden = self._empty.new_empty(tokens, batch, self.model.config.hidden_size)
        dist.recv(hidden, group=self.group, group_src=self.group.rank() - 1)
        self.model.set_input_tensor(hidden)

    def _send_hidden(self, hidden: Tensor) -> None:
        """Send [s, b, h] to the next stage, and go on: at most one send is under way."""
        if self.is_last:
            return
        if self._sending is not None:
            self._sending[0].wait()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, group=self.group, group_dst=self.group.rank() + 1)
        assert work is not None
        self._sending = work, hidden
