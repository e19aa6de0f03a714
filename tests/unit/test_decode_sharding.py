"""The MLP in chunks during prefill; what sharded decode refuses. (Its results: test_golden.py, test_layouts.py.)"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nemo_star.attention.cache import KVCache
from nemo_star.attention.step import AttentionState, PrefillStep
from nemo_star.config.model import MLP_CHUNK_TOKENS
from nemo_star.kernels.registry import get_kernel
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import Block, Partition
from nemo_star.methods.registry import method_of
from nemo_star.models.decode_sharding import PhasedMLP


def state_of(groups, **fields):
    kernel = get_kernel("auto", torch.device("cpu"), torch.float32)
    return AttentionState(method_of(AttentionConfig()), groups.cp, kernel, kernel, torch.float32, **fields)


class Doubling(nn.Module):
    """An MLP that notes how many tokens came at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, hidden):
        self.seen.append(hidden.shape[0])
        return 2 * hidden, None


@pytest.mark.parametrize("tokens", [1, MLP_CHUNK_TOKENS, MLP_CHUNK_TOKENS + 1, 3 * MLP_CHUNK_TOKENS])
def test_a_block_goes_through_the_mlp_in_chunks(groups, tokens):
    mlp = Doubling()
    hidden = torch.arange(tokens, dtype=torch.float32).view(tokens, 1, 1)
    block = Block(0, ((0, tokens),))
    step = PrefillStep(block, Partition(tokens, ((block,),)), KVCache())
    out, bias = PhasedMLP(mlp, state_of(groups, step=step))(hidden)
    assert torch.equal(out, 2 * hidden)
    assert bias is None
    assert max(mlp.seen) <= MLP_CHUNK_TOKENS
    assert sum(mlp.seen) == tokens


def mlp_of(**config):
    settings = {"add_bias_linear": False, "normalization": "RMSNorm", **config}
    mlp = nn.Module()
    mlp.config = SimpleNamespace(**settings)
    mlp.linear_fc1, mlp.linear_fc2 = nn.Linear(4, 8), nn.Linear(4, 4)
    return mlp


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (Doubling(), "an MLP of two linear layers, not Doubling"),
        (mlp_of(activation_func_clamp_value=7.0), "without clamp and offset"),
        (mlp_of(glu_linear_offset=1.0), "without clamp and offset"),
    ],
)
def test_what_cannot_be_sliced_is_refused(groups, mlp, message):
    with pytest.raises(ValueError, match=message):
        PhasedMLP(mlp, state_of(groups, decode_group=groups.collection.tp_cp))
