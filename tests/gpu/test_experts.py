"""Experts of a mixture by grouped matrix products, against one expert after the other; on CPU in float32, and where
there is a GPU in bfloat16, where they may be off float64 by at most twice what the loop is off."""

import types

import pytest
import torch

from nemo_star.config.model import ClampedGate, MoEConfig
from nemo_star.models.experts import Experts
from nemo_star.models.moe import MoE
from nemo_star.parallel.experts import ExpertLayout
from nemo_star.parallel.layout import Layout

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has grouped products since release 2.10"
)

HIDDEN = 64
PLAIN = MoEConfig(num_experts=16, experts_per_token=4, ffn_hidden_size=48)
BIASED = MoEConfig(
    num_experts=16,
    experts_per_token=2,
    ffn_hidden_size=48,
    router_bias=True,
    add_expert_bias=True,
    clamped_gate=ClampedGate(limit=1.0, alpha=1.702),
)
ALL = slice(None)
CASES = {
    "softmax": (PLAIN, ExpertLayout(Layout(1, 1, 1, 1)), ALL),
    "biases, clamped gate": (BIASED, ExpertLayout(Layout(1, 1, 1, 1)), ALL),
    "first half of the experts": (PLAIN, ExpertLayout(Layout(2, 1, 1, 1, 2), tp_rank=0), ALL),
    "last half of the experts": (BIASED, ExpertLayout(Layout(2, 1, 1, 1, 2), tp_rank=1), ALL),
    "third quarter of the experts": (BIASED, ExpertLayout(Layout(1, 4, 1, 1, 4), cp_rank=2), ALL),
    "second half of each expert": (BIASED, ExpertLayout(Layout(2, 1, 1, 1), tp_rank=1), ALL),
    "first channels": (BIASED, ExpertLayout(Layout(1, 1, 1, 1)), slice(0, 16)),
    "other channels": (BIASED, ExpertLayout(Layout(1, 1, 1, 1)), slice(16, 48)),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer(moe, place, hidden=HIDDEN):
    """In float64, weights drawn."""
    config = types.SimpleNamespace(
        hidden_size=hidden, params_dtype=torch.float64, activation_func=torch.nn.functional.silu
    )
    bound = MoE.bound(moe, groups=None, state=types.SimpleNamespace(step=None, decode_group=None), place=place)
    made = bound(config)
    generator = torch.Generator().manual_seed(5)
    for weight in made.parameters():
        weight.data.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return made


def routed(made, tokens, channels, *, grouped, monkeypatch):
    monkeypatch.setattr(Experts, "runs_grouped", lambda experts, mine: grouped)
    with torch.inference_mode():
        return made._routed(tokens, channels)


def tokens_of(count, hidden=HIDDEN):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 3, 300])
@pytest.mark.parametrize("case", CASES)
def test_grouped_experts_are_those_of_the_loop(case, count, device, monkeypatch):
    """A token or three leave most experts without any."""
    moe, place, channels = CASES[case]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # What the experts differ in is theirs: both find the same ones, from weights and tokens that the type has.
    exact, tokens = layer(moe, place).to(dtype).double(), tokens_of(count).to(dtype)
    made = layer(moe, place).to(device, dtype)
    monkeypatch.setattr(made.router, "forward", lambda x: [y.to(device) for y in exact.router(x.cpu().double())])
    expected = routed(exact, tokens.double(), channels, grouped=False, monkeypatch=monkeypatch)
    by_loop, by_groups = (
        routed(made, tokens.to(device), channels, grouped=grouped, monkeypatch=monkeypatch) for grouped in (False, True)
    )
    assert by_groups.dtype == torch.float32
    assert by_groups.shape == by_loop.shape == tokens.shape
    if not count:
        return
    assert expected.abs().max() > 0.1 or count < 300
    allowed = 1e-5 if device == "cpu" else 2 * (by_loop.cpu() - expected).abs().max() + 2**-8 * expected.abs().max()
    assert (by_groups.cpu() - expected).abs().max() <= allowed


def test_what_lies_behind_the_last_group_is_left_out(monkeypatch):
    """torch leaves it as it lay in memory, which may be no number."""
    moe, place, channels = CASES["first half of the experts"]
    made, plain = layer(moe, place).float(), torch.nn.functional.grouped_mm

    def poisoned(tokens, weight, *, offs):
        out = plain(tokens, weight, offs=offs)
        out[offs[-1] :] = float("nan")
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    out = routed(made, tokens_of(300).float(), channels, grouped=True, monkeypatch=monkeypatch)
    assert out.isfinite().all()


def test_a_cpu_takes_the_loop():
    assert not layer(PLAIN, ExpertLayout(Layout(1, 1, 1, 1))).bfloat16().experts.runs_grouped(ALL)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "ffn"), [(2048, 768), (2880, 2880)], ids=["qwen3", "gpt-oss"])
@torch.inference_mode()
def test_grouped_experts_go_into_a_cuda_graph(hidden, ffn):
    """Widths of public models; the host is not asked, and a replay takes other tokens to other experts."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped products are a loop here")
    moe = MoEConfig(num_experts=32, experts_per_token=4, ffn_hidden_size=ffn)
    made = layer(moe, ExpertLayout(Layout(1, 1, 1, 1)), hidden).to("cuda", torch.bfloat16)
    assert made.experts.runs_grouped(ALL)
    tokens = tokens_of(2, hidden).to("cuda", torch.bfloat16)
    made._routed(tokens, ALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made._routed(tokens, ALL)
    for seed in (3, 4):
        tokens.copy_(tokens_of(seed, hidden)[:2])
        graph.replay()
        torch.testing.assert_close(out, made._routed(tokens, ALL))
