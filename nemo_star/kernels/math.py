"""The float32 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_star.kernels.two_parts import no_keys


class MathKernel:
    """The float32 oracle: textbook softmax attention, with a score matrix of sq x sk. For tests and small inputs."""

    name = "math"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.decode(q, k, v, scale, causal=True)[0].to(q.dtype)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        sq, sk, repeats = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
        if sk == 0:
            return no_keys(q)
        keys, values = (x.float().repeat_interleave(repeats, dim=2) for x in (k, v))
        scores = torch.einsum("qbnh,kbnh->bnqk", q.float(), keys) * scale
        if causal:
            visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(diagonal=sk - sq)
            scores = scores.masked_fill(~visible, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.einsum("bnqk,kbnh->qbnh", torch.exp(scores - lse.unsqueeze(-1)), values)
        return out, lse.permute(2, 0, 1)
