"""torch's flash attention on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_star.kernels.two_parts import no_keys

MAX_CHANNELS = 256
"""Head dimension of torch's kernel (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_fwd`)."""


class FlashKernel:
    """torch's CUDA flash attention: float16 or bfloat16, causal aligned to the bottom right, grouped queries.

    Over an empty K it would return lse = +inf, the wrong sign for a merge: that case never reaches it.
    """

    name = "flash"

    @staticmethod
    def takes(channels: int) -> bool:
        """Whether heads of this dimension can be attended to; torch pads others outside of this operator."""
        return channels % 8 == 0 and channels <= MAX_CHANNELS

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
        return _cuda_flash(q, k, v, scale, causal=True, window=window)[0]

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if k.shape[0] == 0:
            return no_keys(q)
        out, lse = _cuda_flash(q, k, v, scale, causal and (q.shape[0] > 1 or window is not None), window)
        return out.float(), lse


def _cuda_flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """torch's kernel takes [b, s, heads, hn]: a view of Megatron's layout. Its window is counted without the token
    itself, and aligned to the bottom right as its causal mask is."""
    sq, sk = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, sq, sk, 0.0, causal, False, scale=scale, **sides
    )
    return out.transpose(0, 1), lse.permute(2, 0, 1)
