import torch

from ..calls import CALLS


def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", interleaved=False, fused=False):
    CALLS.append(("apply_rotary_pos_emb", (t, freqs), {"fused": fused}))
    assert (tensor_format, interleaved, fused) == ("sbhd", False, True)
    assert freqs.dtype == torch.float32
    rotated = freqs.shape[3]  # the first dimensions; the kernel copies the rest (common/fused_rope/fused_rope.cu)
    assert freqs.shape == (t.shape[0], 1, 1, rotated)
    turned, rest = t[..., :rotated], t[..., rotated:]
    first, second = turned.float().chunk(2, dim=-1)
    turned = (turned * freqs.cos() + torch.cat((-second, first), dim=-1) * freqs.sin()).to(t.dtype)
    return torch.cat((turned, rest), dim=-1)
