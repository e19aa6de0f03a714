"""Parts of a fidelity report: divergences, ranks, shares, verdicts, samples, scores."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import scipy.stats
import torch

from nemo_star.config.compose import compose
from nemo_star.config.fidelity import FidelityConfig
from nemo_star.evaluation.fidelity.divergence import Divergences
from nemo_star.evaluation.fidelity.readings import sampled_rows
from nemo_star.evaluation.fidelity.report import write_report
from nemo_star.evaluation.fidelity.scores import correlations, largest_losses, points, read_scores
from nemo_star.evaluation.fidelity.summary import EDGE, NOT_SAFE, SAFE, summaries
from nemo_star.evaluation.fidelity.texts import pieces, place_of
from nemo_star.evaluation.journal import Journal
from nemo_star.evaluation.samples import Asked, given
from nemo_star.evaluation.statistics import spearman, wilson
from nemo_star.text.tokenizer import Tokenizer

COMMON = {"checkpoint": "x", "output": "y"}


def test_divergences_are_those_of_scipy():
    reference, other = (torch.randn(7, 50, generator=torch.Generator().manual_seed(seed)) * 4 for seed in (1, 2))
    other[3] = reference[3]
    found = Divergences()
    found.add(reference[:4], other[:4])
    found.add(reference[4:], other[4:])
    p, q = (logits.double().softmax(-1).numpy() for logits in (reference, other))
    assert found.kl == pytest.approx(scipy.stats.entropy(p, q, axis=1), abs=1e-12)
    assert found.agree == list(p.argmax(1) == q.argmax(1))
    assert (found.kl[3], found.agree[3]) == (0.0, True)
    assert not all(found.agree)


def test_ranks_correlate_as_in_scipy():
    rng = np.random.default_rng(0)
    for size in (3, 5, 40):
        first = rng.integers(0, 4, size).astype(float)  # with ties
        second = first + rng.normal(0, 2, size)
        first[:2] = (0, 1)
        expected = scipy.stats.spearmanr(first, second).statistic
        assert spearman(list(first), list(second)) == pytest.approx(expected, abs=1e-12)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_shares_have_the_interval_of_scipy():
    for count, of in ((0, 7), (40, 40), (13, 21)):
        found = wilson(count, of)
        theirs = scipy.stats.binomtest(count, of).proportion_ci(method="wilson")
        assert (found.low, found.mean, found.high) == pytest.approx(
            (100 * theirs.low, 100 * count / of, 100 * theirs.high), abs=1e-9
        )
    with pytest.raises(ValueError, match="no values"):
        wilson(0, 0)


def test_rows_are_spread_over_the_context():
    rows = sampled_rows(1000, 10, seed=1)
    assert torch.equal(rows // 100, torch.arange(10))
    assert not torch.equal(rows, sampled_rows(1000, 10, seed=2))
    assert torch.equal(sampled_rows(7, 100, seed=1), torch.arange(7))


def line(agree, kl=0.1, *, is_given=False, context=900):
    return {
        "context_tokens": context,
        "query_tokens": 3,
        "given": is_given,
        "kl": [kl] * len(agree),
        "agree": agree,
        "query_kl": [kl, kl],
        "query_agree": [1, 0],
        "blocks": 2,
        "block": 1,
        "known_block": None,
        "lost": [[kl, 0.0], [0.0, 0.0]],
        "lost_by_block": [[0.0, kl], [0.0, 0.0]],
        "first_tokens": {"dense": {"block": [[0.1] * 16] * 2, "start": [[0.2] * 16] * 2}},
    }


@pytest.mark.parametrize(
    ("samples", "changed", "is_given", "verdict"),
    [
        (40, 0, False, SAFE),
        (40, 2, False, EDGE),
        (10, 0, False, EDGE),  # too few to tell
        (40, 12, False, NOT_SAFE),
        (40, 0, True, SAFE),
        (10, 0, True, EDGE),
        (40, 30, True, NOT_SAFE),
    ],
)
def test_a_verdict_is_what_the_interval_says(samples, changed, is_given, verdict):
    lines = {
        ("star", "task", 1024, str(number)): line([1] * 9 + [int(number >= changed)], is_given=is_given)
        for number in range(samples)
    }
    (found,) = summaries(lines, ["star"])
    assert found.verdict(10.0) == verdict
    assert found.kept.mean == 100 * (1 - changed / samples)
    assert found.agreement.mean == pytest.approx(100 - 10 * changed / samples)


@pytest.fixture
def scored(tmp_path):
    """Lines of three block sizes, one better than the other, and the folder of an evaluation that says the same."""
    journal = Journal(tmp_path / "scores", {"seed": 1}, resume=False, overwrite=False)
    journal.open()
    lines = {}
    for rank, contender in enumerate(("star n/2", "star n/4", "star n/8")):
        for number in range(12):
            is_wrong = number < 3 * rank
            lines[contender, "one", 1024, str(number)] = line([1, int(not is_wrong)], kl=0.1 + is_wrong)
            journal.add((contender, "one", 1024, str(number)), {"score": 100.0 * (not is_wrong), "context_tokens": 900})
    for number in range(12):
        journal.add(("dense", "one", 1024, str(number)), {"score": 100.0, "context_tokens": 900})
    return lines, tmp_path / "scores"


def test_fidelity_is_compared_with_scores(scored, tmp_path):
    lines, folder = scored
    scores = read_scores(folder, {"seed": 1})
    means = points(lines, scores)
    assert [(each.contender, each.score) for each in means] == [
        ("star n/2", 100.0),
        ("star n/4", 75.0),
        ("star n/8", 50.0),
        ("dense", 100.0),
    ]
    found = {name: values for name, *values in correlations(lines, scores)}
    assert found["top-1 agreement"] == [pytest.approx(1), pytest.approx(1)]
    expected = scipy.stats.spearmanr([each.fidelity["mean KL"] for each in means], [100, 75, 50, 100]).statistic
    assert found["mean KL"] == [pytest.approx(expected), pytest.approx(-1)]
    assert largest_losses(lines, scores) == [
        ("star n/2", 1024, 0.0, 0.0),
        ("star n/4", 1024, 25.0, 25.0),
        ("star n/8", 1024, 50.0, 50.0),
    ]
    names = [each.contender for each in means[:3]]
    text = write_report(tmp_path, lines, names, scores, tolerance=10, about="About.")
    assert "| one | star n/8 | not safe | 12 | 50.0 [" in text
    assert "| top-1 agreement | 1.00 | 1.00 |" in text
    written = {file.name for file in tmp_path.iterdir() if file.is_file()}
    tables = {"summary", "positions", "blocks", "heads", "lost_by_block", "first_tokens", "scores"}
    pictures = {"positions", "heads", "first_tokens", "scores"}
    assert written == {f"{name}.csv" for name in tables} | {f"{name}.png" for name in pictures} | {"report.md"}
    rows = list(csv.DictReader((tmp_path / "heads.csv").open()))
    assert (rows[0]["layer"], rows[0]["head"]) == ("1", "1")
    assert float(rows[0]["lost"]) == pytest.approx(10)


def test_scores_of_other_samples_are_refused(scored, tmp_path):
    lines, folder = scored
    with pytest.raises(ValueError, match="other keys: seed"):
        read_scores(folder, {"seed": 2})
    with pytest.raises(ValueError, match="holds no samples"):
        read_scores(tmp_path, {"seed": 1})
    key = next(iter(lines))
    lines[key] = line([1, 1], context=901)
    with pytest.raises(ValueError, match="another context"):
        points(lines, read_scores(folder, {"seed": 1}))
    others = {("star n/3", *rest): value for (_, *rest), value in lines.items()}
    with pytest.raises(ValueError, match="of these methods: star n/3"):
        points(others, read_scores(folder, {"seed": 1}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compare": ("dense",)}, "dense gives what dense attention gives"),
        ({"compare": ("star+decode:sharded",)}, "parallel.decode"),
        ({"chat": True}, "chat=true is of nemo-star evaluate"),
        ({"input": "a", "texts": ("b",)}, "input and texts are both set"),
        ({"texts": ("b",), "scores": "c"}, "texts has none"),
        ({"rows": 0}, "rows=0"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"texts": ("b",), "lengths": (96,)}, "leave no context of lengths=96"),
        ({"block_sizes": ("half",)}, "not 'half'"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FidelityConfig(**{**COMMON, **values})


def test_the_recipe_composes():
    config = compose(FidelityConfig, ["checkpoint=c", "output=o", "block_sizes=[n/4,512]"], tool="fidelity")
    assert config.block_sizes == ("n/4", 512)
    defaults = FidelityConfig(**COMMON, tasks=("niah_single_1",), inference=config.inference)
    assert dataclasses.replace(config, checkpoint="x", output="y", block_sizes=defaults.block_sizes) == defaults


def test_a_text_is_cut_into_pieces(demo, tmp_path):
    tokenizer = Tokenizer.load(demo / "hf")
    (tmp_path / "book.txt").write_text("The sky is blue. " * 100)
    ids = tokenizer.encode_query("The sky is blue. " * 100)
    sizes = {"query_tokens": 10, "answer_tokens": 20}
    config = FidelityConfig(**COMMON, texts=(str(tmp_path / "book.txt"),), lengths=(101,), samples=2, **sizes)
    first, second = pieces(config, tokenizer)
    assert first.context[0] == second.context[0] == tokenizer.hf.bos_token_id
    assert [*first.context[1:], *first.query, *first.answer] == ids[:100]
    assert [*second.context[1:], *second.query, *second.answer] == ids[100:200]
    assert (len(first.context), len(first.query), len(first.answer)) == (71, 10, 20)
    with pytest.raises(ValueError, match="tokens, fewer than lengths=8192"):
        list(pieces(dataclasses.replace(config, lengths=(8192,)), tokenizer))


def test_what_is_asked_for_is_found_where_it_stands_once():
    asked = Asked("1", "task", 64, "a b c d", "which?", ["c"], 8)
    count = lambda text: len(text.split())  # noqa: E731
    assert place_of(asked, count) == 2
    for changes in ({"outputs": ["c", "d"]}, {"outputs": []}, {"context": "c c"}, {"context": "a"}, {"context": [1]}):
        assert place_of(dataclasses.replace(asked, **changes), count) is None


def test_given_samples_need_no_outputs(tmp_path):
    file = tmp_path / "given.jsonl"
    config = FidelityConfig(**COMMON, input=str(file), lengths=(64,))
    file.write_text(json.dumps({"id": 1, "context": "a b", "query": "c", "answer": "d"}) + "\n")
    (asked,) = given(config, lambda text: len(text.split()), needs_outputs=False)
    assert (asked.answer, asked.outputs) == ("d", [])
    with pytest.raises(ValueError, match="no field 'outputs'"):
        list(given(config, len))
    file.write_text(json.dumps({"id": 1, "context": "a b", "query": "c", "answer": ["d"]}) + "\n")
    with pytest.raises(ValueError, match="line 1: answer must be a text"):
        list(given(config, len, needs_outputs=False))
    file.write_text(json.dumps({"id": 1, "context": "a b", "query": "c", "answer": 7, "outputs": ["7"]}) + "\n")
    assert next(given(config, len)).answer is None  # a further field of a sample that is scored
