import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_star.models.families.llama import FAMILY
from nemo_star.models.rotary import PositionRotaryEmbedding, inverse_frequencies

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
