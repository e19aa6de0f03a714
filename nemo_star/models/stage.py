"""This rank's pipeline stage: a GPTModel's parts run one after another, hidden states passed on, logits passed back.

The model's parts are called directly (embedding, decoder, output layer), not through `GPTModel.forward`: positions are
explicit, the head runs on one position only, and no private method of Megatron is relied upon. Stages exchange hidden
states by plain send and receive over the pp group (Megatron's P2PCommunicator needs CUDA) and follow each other: while
a stage works on one block, the one before it is already at the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from nemo_star.attention.cache import KVShape
from nemo_star.attention.step import PrefillStep
from nemo_star.kernels import few_rows
from nemo_star.models.moe import MoE
from nemo_star.models.rotary import PositionRotaryEmbedding
from nemo_star.models.rotary_pieces import RotaryPieces
from nemo_star.models.sequence_parallel import SequenceParallel
from nemo_star.parallel.groups import all_gather

_FEW_ROWS = 8
"""For which a product with the weight on the left is faster on CPU."""


class Stage:
    """Runs one rank's part of a GPTModel whose layers come from `star_layer_spec`.

    Args:
        rotary: angles for the layers.
        windowed_rotary: of windowed layers, where theirs differ.
        vocab_size: true size; rows that only pad the vocabulary to tp never reach the logits.
        decode_group: tp x cp, tp fastest, whose ranks divide the head; None: each cp rank computes all of it.
        sequence_parallel: divide the hidden states of a context block over the tp ranks, where its length divides.
    """

    def __init__(
        self,
        model: GPTModel,
        rotary: PositionRotaryEmbedding,
        pp_group: dist.ProcessGroup,
        vocab_size: int,
        *,
        windowed_rotary: PositionRotaryEmbedding | None = None,
        decode_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        self.model = model
        self.rotary = rotary
        self.windowed_rotary = windowed_rotary
        self._windowed_angles: Tensor | None = None
        self.group = pp_group
        self.vocab_size = vocab_size
        self.decode_group = decode_group
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self._sending: tuple[dist.Work, Tensor] | None = None
        self._sequence_parallel = SequenceParallel(model, model.tp_group.size() if sequence_parallel else 1)
        windows = {layer.layer_number: layer.self_attention.core_attention.window for layer in model.decoder.layers}
        self.full_layer_numbers = [number for number, window in windows.items() if window is None]
        """Megatron's global, 1-based numbers of this stage's layers that see everything."""
        self.windowed_layer_numbers = [number for number, window in windows.items() if window is not None]
        self.window = next((window for window in windows.values() if window is not None), None)
        """Tokens that a windowed layer's token sees, where the stage has such layers; one size for all of them."""
        if windowed_rotary is not None:
            for layer in model.decoder.layers:
                if windows[layer.layer_number] is not None:
                    layer.self_attention.register_forward_pre_hook(self._turn_otherwise, with_kwargs=True)
        self.rotary_pieces = RotaryPieces(model)  # behind the hook above, whose angles it takes

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
        return KVShape(1, groups, config.kv_channels, self.dtype, self.device)

    def encode(self, input_ids: Tensor, position_ids: Tensor, context_tokens: Tensor) -> None:
        """Run the stage's layers for what they leave in the K/V cache; ids and positions [s], context_tokens [1]."""
        if not input_ids.numel():
            self._without_tokens()
            return
        with self._sequence_parallel.over(input_ids.numel()):
            self._send_on(self._layers(input_ids, position_ids, context_tokens))

    def decode(
        self, input_ids: Tensor, position_ids: Tensor, context_tokens: Tensor, wanted: list[int]
    ) -> Tensor | None:
        """Logits [len(wanted), vocab] float32 after these of input_ids [s]: on the last stage; None on the others.

        Args:
            context_tokens: [s], length of the context that each token hangs on.
        """
        hidden = self._layers(input_ids, position_ids, context_tokens)
        if self.is_last:
            return self._head(_rows(hidden, wanted))
        self._send_on(hidden)
        return None

    def logits_to_first(self, logits: Tensor | None, rows: int) -> Tensor:
        """The last stage's logits [rows, vocab] on the first one; to be called on these two."""
        if self.is_last:
            assert logits is not None
            if not self.is_first:
                dist.send(logits, group=self.group, group_dst=0)
            return logits
        received = torch.empty(rows, self.vocab_size, dtype=torch.float32, device=self.device)
        dist.recv(received, group=self.group, group_src=self.group.size() - 1)
        return received

    def _layers(self, input_ids: Tensor, position_ids: Tensor, context_tokens: Tensor) -> Tensor:
        """Hidden states [s, b, h] after this stage's layers."""
        hidden = None
        if self.is_first:
            hidden = self.model.embedding(input_ids=input_ids[None], position_ids=position_ids[None])
        else:
            self.model.set_input_tensor(self._receive(self._sequence_parallel.length(input_ids.numel())))
        angles = self.rotary(position_ids, context_tokens)
        if self.windowed_rotary is not None:
            self._windowed_angles = self.windowed_rotary(position_ids, context_tokens)
        return self.model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)

    def _turn_otherwise(self, attention: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Megatron hands all layers the same angles: a windowed one takes its own."""
        return arguments, {**keywords, "rotary_pos_emb": self._windowed_angles}

    def query_scales(self, position_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What rotated queries are multiplied by at these positions [s], in full layers and in windowed ones."""
        scale = self.rotary.query_scale(position_ids)
        windowed = self.windowed_rotary
        return scale, scale if windowed is None else windowed.query_scale(position_ids)

    def accompany(self, step: PrefillStep) -> None:
        """Take part in the work of other cp ranks for blocks of theirs, where this one has no more."""
        self._without_tokens(step)

    def _without_tokens(self, step: PrefillStep | None = None) -> None:
        """Take part in the work of other ranks without tokens of one's own.

        Megatron's layers cannot run on no tokens, but K/V of others may travel through this rank, and its experts are
        asked for.

        Args:
            step: of a rank that has no block; None: it has one that is empty, and attends.
        """
        shape = self.kv_shape
        heads = self.model.config.num_attention_heads // self.model.tp_group.size()
        q, k, v = (
            torch.empty(0, shape.batch, count, shape.channels, dtype=shape.dtype, device=shape.device)
            for count in (heads, shape.groups, shape.groups)
        )
        hidden = torch.empty(0, shape.batch, self.model.config.hidden_size, dtype=shape.dtype, device=shape.device)
        for layer in self.model.decoder.layers:
            core_attention = layer.self_attention.core_attention
            if step is None:
                core_attention(q, k, v)
            elif not core_attention.only_caches:
                core_attention.accompany(step, k)
            if isinstance(layer.mlp, MoE) and layer.mlp.place.over_cp:
                layer.mlp(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        """hidden [rows, b, h] -> logits [rows, vocab] float32; those of all tokens of a 128K block would be 34 GB."""
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else self.model.output_layer.weight
        if self.decode_group is not None:
            return self._divided_head(hidden, weight)
        logits = _product(hidden, weight).float()  # [rows, vocab / tp]
        if self.model.tp_group.size() > 1:
            logits = all_gather(logits, self.model.tp_group).transpose(0, 1).flatten(1)
        return logits[:, : self.vocab_size].contiguous()

    def _divided_head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The same from weight [vocab / tp, h]: each cp rank the next ceil(1 / cp) of its rows, the last ones fewer."""
        assert self.decode_group is not None
        tp_size = self.model.tp_group.size()
        cp_size = self.decode_group.size() // tp_size
        size, rows = weight.shape[0], hidden.shape[0]
        share = -(-size // cp_size)
        start = min(self.decode_group.rank() // tp_size * share, size)
        logits = hidden.new_zeros(rows, share, dtype=torch.float32)
        mine = weight[start : start + share]
        logits[:, : mine.shape[0]] = _product(hidden, mine)
        gathered = all_gather(logits, self.decode_group).view(cp_size, tp_size, rows, share)
        by_tp = gathered.permute(2, 1, 0, 3).reshape(rows, tp_size, -1)[:, :, :size]
        return by_tp.flatten(1)[:, : self.vocab_size].contiguous()

    def _receive(self, tokens: int) -> Tensor:
        """[s, b, h] from the stage before, whose token ids are known here too (s: of this rank's hidden states)."""
        hidden = torch.empty(tokens, 1, self.model.config.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden, group=self.group, group_src=self.group.rank() - 1)
        return hidden

    def _send_on(self, hidden: Tensor) -> None:
        """Send [s, b, h] to the next stage, and go on: at most one send is under way."""
        if self.is_last:
            return
        self.finish_sending()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, group=self.group, group_dst=self.group.rank() + 1)
        assert work is not None
        self._sending = work, hidden

    def finish_sending(self) -> None:
        """Wait until the next stage has what was sent, and let go of it: of a long block, hundreds of megabytes."""
        if self._sending is not None:
            self._sending[0].wait()
        self._sending = None


def _rows(hidden: Tensor, wanted: list[int]) -> Tensor:
    """hidden[wanted], as a view where these rows lie together: a list of them would go to the device as a tensor."""
    first, last = wanted[0], wanted[-1]
    return hidden[first : last + 1] if wanted == list(range(first, last + 1)) else hidden[wanted]


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [rows, b, h] times a part of the head's weight [part of vocab, h] -> [rows, part of vocab]."""
    if few_rows.takes(hidden, weight):
        return few_rows.linear(hidden, weight).flatten(1)
    if hidden.device.type == "cpu" and 1 < hidden.shape[0] <= _FEW_ROWS:
        # MKL packs the weight anew for each product of more than one row, unless the rows are the right operand.
        return torch.mm(weight, hidden.flatten(1).t()).t()
    return F.linear(hidden, weight).flatten(1)
