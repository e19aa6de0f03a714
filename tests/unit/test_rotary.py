from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_star.models.families.llama import FAMILY
from nemo_star.models.rotary import PositionRotaryEmbedding, inverse_frequencies
from nemo_star.models.rotary_pieces import RotaryPieces, rotate_in_pieces

SCALINGS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 20000.0,
        "factor": 3.5,
        "low_freq_factor": 2.0,
        "high_freq_factor": 7.0,
        "original_max_position_embeddings": 512,
    },
]


@pytest.mark.parametrize("rope", SCALINGS, ids=str)
def test_frequencies_are_those_of_transformers(rope):
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    model = FAMILY.model_config(config.to_dict())
    ours = inverse_frequencies(64, model.rotary_base, model.rope_scaling)
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)


def test_angles_follow_the_position_ids():
    rotary = PositionRotaryEmbedding(8, base=10000.0)
    angles = rotary(torch.tensor([0, 1, 2, 70, 71]), torch.tensor([70]))
    assert angles.shape == (5, 1, 1, 8)
    torch.testing.assert_close(angles[3, 0, 0, :4], 70 * rotary.inv_freq)
    torch.testing.assert_close(angles[..., :4], angles[..., 4:])


def largest_offset(t):
    """Of an element, from the tensor's first one."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def turned(t, angles):
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


@pytest.mark.parametrize("limit", [700, 1023, 1024, 5000, 2**31 - 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_are_rotated_as_the_whole(limit, batch):
    """Q as a tensor of its own, K as a view of the fused QKV."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(50, batch, 2, 4, 16, generator=generator)
    q, k, v = qkv[:, :, :, :2].flatten(2, 3).contiguous(), qkv[:, :, :, 2], qkv[:, :, :, 3].clone()
    angles = torch.rand(50, 1, 1, 16, generator=generator)
    for t in (q, k):
        expected, pieces = turned(t, angles), []
        rotated = rotate_in_pieces(lambda t, a, pieces=pieces: (pieces.append(t), turned(t, a))[1], t, angles, limit)
        assert torch.equal(rotated, expected)
        assert all(max(largest_offset(piece), piece.numel() - 1) <= limit for piece in pieces)
        assert (len(pieces) == 1) == (max(largest_offset(t), t.numel() - 1) <= limit)
    assert torch.equal(qkv[:, :, :, 3], v)  # V lies between


@pytest.mark.parametrize(
    ("tokens", "pieces_of_q", "pieces_of_k"),
    [(349_525, 1, 1), (349_526, 1, 2), (524_288, 1, 2), (524_289, 2, 2), (1_048_576, 2, 4)],
)
def test_a_large_block_of_llama_8b_stays_within_32_bits(tokens, pieces_of_q, pieces_of_k):
    """Sizes only, on the device without memory."""
    fused = torch.empty(tokens, 1, 8, 6, 128, device="meta")
    k, q = fused[:, :, :, 4], torch.empty(tokens, 1, 32, 128, device="meta")
    angles = torch.empty(tokens, 1, 1, 128, device="meta")
    for t, expected in ((q, pieces_of_q), (k, pieces_of_k)):
        pieces = []
        rotate_in_pieces(lambda t, a, pieces=pieces: (pieces.append(t), t.clone())[1], t, angles)
        assert len(pieces) == expected
        assert sum(piece.shape[0] for piece in pieces) == tokens
        assert max(largest_offset(piece) for piece in pieces) < 2**31
        assert (largest_offset(t) < 2**31) == (expected == 1)


class Noting(nn.Module):
    """Attention, or its core, that notes what it was given."""

    def forward(self, *arguments, **keywords):
        self.given = arguments, keywords


@pytest.mark.parametrize("tokens", [16, 17])
def test_only_what_one_call_cannot_rotate_is_taken_from_megatron(tokens):
    """Eight heads and two groups of 16 over two tp ranks, 96 elements a token, at most 16 tokens; the second layer is
    one that is not rotated."""
    config = SimpleNamespace(num_layers=2, num_attention_heads=8, num_query_groups=2, kv_channels=16)
    config.apply_rope_fusion, config.no_rope_freq = True, [0, 1]
    config.rotary_interleaved = config.multi_latent_attention = False
    layers = [nn.Module(), nn.Module()]
    for number, layer in enumerate(layers, start=1):
        layer.layer_number, layer.self_attention = number, Noting()
        layer.self_attention.core_attention = Noting()
    two = SimpleNamespace(size=lambda: 2)
    model = SimpleNamespace(config=config, decoder=SimpleNamespace(layers=layers), tp_group=two)
    model.pg_collection = SimpleNamespace(cp=two)
    pieces = RotaryPieces(model)
    pieces.limit = 16 * 96
    config.apply_rope_fusion = False  # there is no kernel here: Megatron's own rotation computes the same
    angles = torch.rand(tokens, 1, 1, 16)
    for layer, taken in zip(layers, (tokens > 16, False), strict=True):
        q, k, v = torch.randn(tokens, 1, 4, 16), torch.randn(tokens, 1, 1, 16), torch.randn(tokens, 1, 1, 16)
        expected = (turned(q, angles), turned(k, angles)) if taken else (q.clone(), k.clone())
        layer.self_attention("hidden", rotary_pos_emb=angles)
        layer.self_attention.core_attention(q, k, v, None)
        assert (layer.self_attention.given[1]["rotary_pos_emb"] is None) == taken
        given = layer.self_attention.core_attention.given[0]
        torch.testing.assert_close(given[:2], expected)
        assert given[2] is v
        assert given[3] is None
