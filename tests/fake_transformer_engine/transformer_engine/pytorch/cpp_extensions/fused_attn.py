import torch

from ..calls import CALLS

FusedAttnBackend = {"F16_arbitrary_seqlen": object(), "FP8": object(), "No_Backend": object()}


def attend(q, k, v, scale, mask, left=-1):
    """out [sq, b, np, hn] and lse [b, np, sq, 1]; masks are aligned as Transformer Engine aligns them; `left` keys
    before its own are seen by a query, -1: all."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(repeats, 2) for x in (k, v))
    scores = torch.einsum("qbnh,kbnh->bnqk", q.double(), keys) * scale
    sq, sk = scores.shape[2:]
    diagonal = {"causal": 0, "causal_bottom_right": sk - sq, "no_mask": sk}[mask]
    visible = torch.ones(sq, sk, dtype=torch.bool).tril(diagonal)
    if left >= 0:
        visible = visible.triu(diagonal - left)
    scores = scores.masked_fill(~visible, float("-inf"))
    out = torch.einsum("bnqk,kbnh->qbnh", scores.softmax(-1), values)
    return out.to(q.dtype), scores.logsumexp(-1, keepdim=True).float()


def fused_attn_fwd(*args, **keywords):
    CALLS.append(("fused_attn_fwd", args, keywords))
    q, k, v = (keywords[name] for name in "qkv")
    assert k.shape[0] > 0
    assert all(x.is_contiguous() for x in (q, k, v))
    for x, length, offsets in ((q, "max_seqlen_q", "cu_seqlens_q"), (k, "max_seqlen_kv", "cu_seqlens_kv")):
        assert keywords[length] == x.shape[0]
        assert keywords[offsets].dtype == torch.int32
        assert keywords[offsets].tolist() == [x.shape[0] * row for row in range(x.shape[1] + 1)]
    mask = keywords["attn_mask_type"]
    assert keywords["window_size"] == ((-1, -1) if mask == "no_mask" else (-1, 0))
    out, lse = attend(q, k, v, keywords["attn_scale"], mask)
    return out, [lse, torch.zeros(2, dtype=torch.int64)]
