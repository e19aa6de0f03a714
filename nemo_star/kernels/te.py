"""Transformer Engine's attention (cuDNN) behind the two functions of a kernel.

Prefill goes through the public `DotProductAttention`, which chooses between its backends itself. It never returns the
log-sum-exp, so decode and ring call `fused_attn_fwd`, the function beneath it; group and merge stay ours
(`cp_group=None`). Read in Transformer Engine 2.9 to 2.20; tests/data/te_signatures.json records the signatures:

- `fused_attn_fwd` returns `(out, aux, *more)`. `aux[0]` is cuDNN's softmax statistics, [b, np, sq, 1] float32: the
  maximum plus the logarithm of the sum, that is the log-sum-exp of the scaled scores (its docstring leaves the maximum
  out; releases that return both parts build it as `Max + log(Sum_Exp)`, and Transformer Engine's own context
  parallelism merges by `aux[0]`). It is there with `is_training=False`, too, whatever the docstring says: evaluation
  under context parallelism needs it.
- It takes tensors as its layout names them, contiguous; strides are looked at in `DotProductAttention` only.
- Arguments have been added in the middle of the list, never renamed: all go by keyword.
- A bottom-right mask with lengths that are no multiple of 64 needs cuDNN 9.7 (common/fused_attn/fused_attn.cpp,
  `nvte_get_fused_attn_backend`): `decode_by_parts` does without it. `DotProductAttention` would take unfused attention
  instead, a score matrix of all heads, without a word; `NVTE_UNFUSED_ATTN=0` makes it raise.
- cuDNN's plans are kept in a map that nothing is ever taken out of, under a key with `s_q` and `s_kv`
  (common/fused_attn/fused_attn_f16_arbitrary_seqlen.cu, `sdpa_f16_fprop_cache`; utils.h, `FADescriptor_v1`): every pair
  of lengths that has not been seen is built, so decode goes elsewhere (`settle.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemo_star.kernels.torch_flash import FlashKernel
from nemo_star.kernels.two_parts import decode_by_parts

KEPT_OFFSETS = 64
"""Pairs of batch and length whose offsets are kept: those of a step, and of the steps before."""


class TEKernel:
    """Float16 or bfloat16 on CUDA; grouped queries; head dimensions in multiples of 8, to 128 (on Hopper to 256)."""

    name = "te"

    def __init__(self) -> None:
        self._modules: dict[tuple[int, int, int, float], Any] = {}
        self._offsets: dict[tuple[int, int, torch.device], Tensor] = {}

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
        attention = self._module(q.shape[2], k.shape[2], q.shape[3], scale)
        # The same where there is no anchor; the plain mask is known to more of its backends.
        mask = "causal" if q.shape[0] == k.shape[0] else "causal_bottom_right"
        sides = (-1, 0) if window is None else (window - 1, 0)
        q, k, v = map(_at_its_start, (q, k, v))
        with _never_unfused():
            return attention(q, k, v, attn_mask_type=mask, window_size=sides).view(q.shape)

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if window is not None:  # torch's kernel gives the log-sum-exp within a window, without parts to merge
            return FlashKernel().decode(q, k, v, scale, causal, window)
        return decode_by_parts(self._fused_attention, q, k, v, scale, causal=causal)

    def _module(self, heads: int, groups: int, channels: int, scale: float) -> Any:
        """The DotProductAttention for these sizes; it has no weights, so all layers share it."""
        key = (heads, groups, channels, scale)
        if key not in self._modules:
            from transformer_engine.pytorch import DotProductAttention

            self._modules[key] = DotProductAttention(
                num_attention_heads=heads,
                kv_channels=channels,
                num_gqa_groups=groups,
                attention_dropout=0.0,
                qkv_format="sbhd",
                attn_mask_type="causal_bottom_right",
                softmax_scale=scale,
                tp_size=1,  # the heads given are this rank's own
                cp_group=None,
            ).eval()
        return self._modules[key]

    def _fused_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """out [sq, b, np, hn] of q's type, lse [sq, b, np] float32; sq == sk where causal."""
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_fwd

        sq, b = q.shape[:2]
        sk = k.shape[0]
        out, aux, *_ = fused_attn_fwd(
            is_training=False,
            max_seqlen_q=sq,
            max_seqlen_kv=sk,
            cu_seqlens_q=self._offsets_of(b, sq, q.device),
            cu_seqlens_kv=self._offsets_of(b, sk, q.device),
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            fake_dtype=q.dtype,
            fused_attention_backend=FusedAttnBackend["F16_arbitrary_seqlen"],  # a dict at first, an enum later
            attn_scale=scale,
            dropout=0.0,
            qkv_layout="sbhd_sbhd_sbhd",
            attn_bias_type="no_bias",
            attn_mask_type="causal" if causal else "no_mask",
            window_size=(-1, 0) if causal else (-1, -1),
        )
        return out.view(q.shape), aux[0].view(b, q.shape[2], sq).permute(2, 0, 1)

    def _offsets_of(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Where each sequence of a batch starts, and the last ends: [b + 1] int32; made once for all layers."""
        key = (batch, length, device)
        if key not in self._offsets:
            if len(self._offsets) >= KEPT_OFFSETS:
                self._offsets.clear()
            self._offsets[key] = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        return self._offsets[key]


def _at_its_start(x: Tensor) -> Tensor:
    """`DotProductAttention` refuses contiguous tensors that begin within a storage, unless they lie there as it packs
    them; of others it makes copies itself (pytorch/attention/dot_product_attention/utils.py, `get_qkv_layout`)."""
    return x.clone() if x.storage_offset() and x.is_contiguous() else x


@contextmanager
def _never_unfused() -> Iterator[None]:
    """`DotProductAttention` looks at this variable when it chooses, and it chooses anew when lengths change."""
    name = "NVTE_UNFUSED_ATTN"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
