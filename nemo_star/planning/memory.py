"""Bytes of one rank: weights, K/V cache, and what is alive at the peak of a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_star.config.model import MLP_CHUNK_TOKENS, ModelConfig
from nemo_star.methods.partition import shares
from nemo_star.parallel.experts import ExpertLayout
from nemo_star.parallel.layout import Layout
from nemo_star.planning.work import RankWork, Workload, max_in_flight, rank_work, stage_windows


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank."""

    weights: int
    kv: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.kv + self.activations


def fullest_rank(work: Workload) -> RankMemory:
    """Memory of the rank that needs most, over pipeline stages and cp ranks."""
    activations = {rank.cp_rank: activation_bytes(work, rank) for rank in rank_work(work)}
    needs = [
        RankMemory(
            weight_elements(work.model, work.layout, stage) * work.dtype_bytes,
            kv_bytes(work, stage, rank.tokens),
            activations[rank.cp_rank],
        )
        for stage in _distinct_stages(work)
        for rank in rank_work(work)
    ]
    return max(needs, key=lambda need: need.peak)


def weight_elements(model: ModelConfig, layout: Layout, stage: int) -> int:
    """Elements of the weights of a rank in one pipeline stage.

    The vocabulary is padded to the tp ranks; a tied head is a matrix of its own where it is on another stage.
    """
    layers = range(*shares(model.num_layers, layout.pp)[stage])
    vocabulary = -(-model.vocab_size // layout.tp) * model.hidden_size
    first, last = stage == 0, stage == layout.pp - 1
    tables = first + last - (first and last and model.share_embeddings_and_output_weights)
    inside = len(layers) * _attention_elements(model, layout.tp) + sum(_ffn_elements(model, layout, n) for n in layers)
    return inside + tables * vocabulary + last * model.hidden_size


def _attention_elements(model: ModelConfig, tp: int) -> int:
    """Of one layer: attention's matrices, biases and sinks, and all norms."""
    matrices = model.layer_matrices
    heads = model.query_width + 2 * model.kv_width
    elements = (matrices["qkv"] + matrices["projection"] + model.add_qkv_bias * heads) // tp
    elements += model.add_projection_bias * model.hidden_size
    elements += {"pre": 2, "post": 2, "both": 4}[model.norms] * model.hidden_size
    qk_norms = {"none": 0, "head": 2 * model.kv_channels, "projection": (model.query_width + model.kv_width) // tp}
    return elements + qk_norms[model.qk_norm] + model.attention_sinks * model.num_attention_heads // tp


def _ffn_elements(model: ModelConfig, layout: Layout, layer: int) -> int:
    """Of one layer's FFN, or of the experts of a mixture that the rank holds."""
    hidden, ffn, moe = model.hidden_size, model.ffn_hidden_size, model.moe
    if moe is None or layer in moe.dense_layers:
        return (3 * hidden + 2 * model.add_mlp_bias) * ffn // layout.tp + model.add_mlp_bias * hidden
    place = ExpertLayout(layout)
    expert = (3 * hidden + 2 * moe.add_expert_bias) * moe.ffn_hidden_size // place.expert_tp
    routed = moe.num_experts // place.ep * (expert + moe.add_expert_bias * hidden)
    router = moe.num_experts * (hidden + moe.router_bias)
    return routed + 3 * hidden * moe.shared_ffn_hidden_size // layout.tp + router


def kv_bytes(work: Workload, stage: int, tokens: int) -> int:
    """Bytes of K and V of `tokens` tokens in a stage's layers on one tp rank; a windowed layer keeps no more of them
    than a query can see, and what comes before that where what goes on overlaps with it."""
    return _kv_bytes(work, stage, tokens, beyond=work.method.overlap_size)


def kv_bytes_read(work: Workload, stage: int, tokens: int) -> int:
    """Those of them that a query sees."""
    return _kv_bytes(work, stage, tokens, beyond=0)


def _kv_bytes(work: Workload, stage: int, tokens: int, *, beyond: int) -> int:
    kv = work.model.kv_width // work.layout.tp
    windows = stage_windows(work.model, work.layout.pp, stage)
    held = sum(n * (tokens if window is None else min(tokens, beyond + window - 1)) for window, n in windows.items())
    return held * 2 * kv * work.cache_bytes


def max_kv(work: Workload) -> int:
    """Bytes of K and V on the rank that caches most."""
    return kv_bytes(work, 0, max(rank.tokens for rank in rank_work(work)))


def activation_bytes(work: Workload, rank: RankWork) -> int:
    """What the layer in flight keeps alive at its peak, and what the method keeps for later blocks. An estimate.

    Of hidden states there are four: the stage's input, the layer's, the residual stream and its norm. Beside them,
    either queries, keys and values before and after rotary embedding with the attention's output, or the FFN's gate and
    up projections, the activated gate and their product for a chunk of the tokens; where experts may run grouped, in
    bfloat16 on a GPU, also their tokens, a row for each expert of a token, the results, and these in the tokens' order.
    """
    heads, size = work.heads, work.dtype_bytes
    query, kv = int(heads.query), int(heads.kv)
    tokens = max_in_flight(work, rank)
    hidden = 4 * work.model.hidden_size
    attention = tokens * (hidden + 3 * query + 4 * kv) * size
    attention += int(work.method.attention_bytes(tokens, rank.share, heads, size))
    chunk, moe = min(tokens, MLP_CHUNK_TOKENS), work.model.moe
    divided = work.layout.tp if moe is None else ExpertLayout(work.layout).expert_tp
    ffn = (tokens * hidden + chunk * 4 * work.model.ffn_channels // divided) * size
    if moe is not None and (work.device_type, work.dtype) == ("cuda", "bfloat16"):
        ffn += chunk * moe.experts_per_token * 3 * work.model.hidden_size * size
    head = 4 * work.model.vocab_size * 2  # float32 logits of the last position, and gathered over tp
    layers = stage_windows(work.model, work.layout.pp, 0)[None]
    return max(attention, ffn, head) + int(work.method.kept_bytes(rank.share, heads, size, layers=layers))


def _distinct_stages(work: Workload) -> Sequence[int]:
    """The stages that could be the fullest: the ends, and the one after the first (none between has more layers)."""
    pp = work.layout.pp
    differ = work.model.layers_differ or work.model.window_size is not None
    return range(pp) if differ else sorted({0, min(1, pp - 1), pp - 1})
