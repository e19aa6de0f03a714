"""Transformer Engine's fused rotary embedding, called in pieces where one call would count past 32 bits.

Its kernel adds up element offsets in `int` (common/fused_rope/fused_rope.cu, release 2.9 line 153, 2.20 line 174:
`s_id * stride_s_or_t + b_id * stride_b`, then `+ h_id * stride_h + d_id * stride_d` in `fused_rope_block_forward`), in
the tensor that it reads and in the one that it writes. Megatron splits K as a view of the fused QKV, whose tokens lie
(np + 2 * ng) * hn elements apart: those of Llama 3.1 8B pass 2**31 at token 349,526, its Q, a tensor of its own, at
token 524,289. Beyond that the kernel reads and writes in front of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

MAX_OFFSET = 2**31 - 1
"""Of an element, in what one call reads or writes."""

Turn = Callable[[Tensor, Tensor], Tensor]
"""t [s, b, heads, hn] and angles [s, 1, 1, dim] -> t, rotated."""


def rotate_in_pieces(turn: Turn, t: Tensor, angles: Tensor, limit: int = MAX_OFFSET) -> Tensor:
    """`turn` over as many tokens at a time as keep every offset of a call at `limit` or below.

    Args:
        t: [s, b, heads, hn], any strides with tokens outermost; overwritten, because at these sizes one more of it is
            gigabytes.
        angles: [s, 1, 1, dim] float32.

    Returns:
        t, rotated.
    """
    read = sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
    written = t[0].numel()
    tokens = max(1, min((limit - read) // t.stride(0) + 1, (limit + 1) // written))
    for start in range(0, t.shape[0], tokens):
        piece = slice(start, start + tokens)
        t[piece] = turn(t[piece], angles[piece])
    return t


class RotaryPieces:
    """Takes the angles of long forward passes from Megatron's attention, and rotates Q and K before our core attention.

    Megatron rotates as the last thing before core attention, so nothing else changes. Forward passes that fit one call
    are left to Megatron, as are models that do not use the fused kernel.
    """

    limit = MAX_OFFSET

    def __init__(self, model: GPTModel) -> None:
        self._config = config = model.config
        tp_size = model.tp_group.size()
        heads = config.num_attention_heads + 2 * (config.num_query_groups or config.num_attention_heads)
        self._width = heads // tp_size * config.kv_channels
        self._group = model.pg_collection.cp
        self._angles: Tensor | None = None
        # With Megatron's own YaRN there is a factor, which Megatron does not give to the fused kernel.
        if config.apply_rope_fusion and not getattr(config, "yarn_rotary_scaling_factor", None):
            unrotated = getattr(config, "no_rope_freq", None) or [0] * config.num_layers
            for layer in model.decoder.layers:
                if not unrotated[layer.layer_number - 1]:
                    layer.self_attention.register_forward_pre_hook(self._take_angles, with_kwargs=True)
                    layer.self_attention.core_attention.register_forward_pre_hook(self._rotate)

    def _take_angles(self, _: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        angles = keywords["rotary_pos_emb"]
        if angles is None or angles.shape[0] * self._width <= self.limit:
            return None
        self._angles = angles
        return arguments, {**keywords, "rotary_pos_emb": None}

    def _rotate(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._angles is None:
            return None
        angles, self._angles = self._angles, None
        q, k, *others = arguments
        return *(rotate_in_pieces(self._turn, t, angles, self.limit) for t in (q, k)), *others

    def _turn(self, t: Tensor, angles: Tensor) -> Tensor:
        rotated: Tensor = apply_rotary_pos_emb(t, angles, config=self._config, cp_group=self._group)
        return rotated
