import torch

from nemo_star.config.sampling import SamplingParams
from nemo_star.engine.sampling import Sampler

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def sampler(**settings):
    return Sampler(SamplingParams(**{"temperature": 1.0, **settings}), seed=settings.get("seed", 7))


def test_greedy_takes_the_likeliest():
    assert Sampler(SamplingParams(), seed=0)(LOGITS) == 1


def test_a_seed_repeats_itself_and_another_differs():
    draws = [
        [Sampler(SamplingParams(temperature=1.0), seed)(torch.zeros(1000)) for _ in range(1)] for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_temperature_scales_the_logits():
    torch.testing.assert_close(sampler(temperature=0.5).probabilities(LOGITS), torch.softmax(LOGITS * 2, 0))


def test_top_k_keeps_k():
    assert (sampler(top_k=2).probabilities(LOGITS) > 0).tolist() == [False, True, True, False]
    assert (sampler(top_k=99).probabilities(LOGITS) > 0).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # probabilities of LOGITS: 0.087, 0.644, 0.237, 0.032
    assert (sampler(top_p=0.6).probabilities(LOGITS) > 0).tolist() == [False, True, False, False]
    assert (sampler(top_p=0.7).probabilities(LOGITS) > 0).tolist() == [False, True, True, False]
    for tiny in (1e-9, 1e-300):  # the latter is 0 in float32
        assert (sampler(top_p=tiny).probabilities(LOGITS) > 0).tolist() == [False, True, False, False]
    kept = sampler(top_p=0.7).probabilities(LOGITS)
    torch.testing.assert_close(kept.sum(), torch.tensor(1.0))


def test_draws_follow_the_probabilities():
    draw = sampler()
    counts = torch.bincount(torch.tensor([draw(LOGITS) for _ in range(4000)]), minlength=4) / 4000
    assert (counts - torch.softmax(LOGITS, 0)).abs().max() < 0.03
