import torch

from ..calls import CALLS


def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", interleaved=False, fused=False):
    CALLS.append(("apply_rotary_pos_emb", (t, freqs), {"fused": fused}))
    assert (tensor_format, interleaved, fused) == ("sbhd", False, True)
    assert freqs.dtype == torch.float32
    assert freqs.shape == (t.shape[0], 1, 1, t.shape[3])
    first, second = t.float().chunk(2, dim=-1)
    return (t * freqs.cos() + torch.cat((-second, first), dim=-1) * freqs.sin()).to(t.dtype)
