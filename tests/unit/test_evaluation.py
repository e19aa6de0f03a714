"""Parts of an evaluation: sizes, intervals, the journal, the report."""

import gc
import json
import re

import numpy as np
import pytest
import scipy.stats
from store_walk import live_bytes

from nemo_star.config.evaluate import EvaluateConfig, size_of
from nemo_star.config.generate import InferenceConfig
from nemo_star.evaluation import report
from nemo_star.evaluation import run as sweep
from nemo_star.evaluation.journal import SAMPLES_FILE, Journal
from nemo_star.evaluation.report import ALL_TASKS, cells, comma_separated, markdown, write_report
from nemo_star.evaluation.samples import given, made
from nemo_star.evaluation.statistics import bootstrap
from nemo_star.methods.config import AttentionConfig

COMMON = {"checkpoint": "x", "output": "y"}


def test_sizes_are_tokens_or_parts_of_the_length():
    assert size_of(2048, 8192) == 2048
    assert size_of("n/4", 8190) == 2048
    for wrong in ("n/0", "n", "4/n", -1, "a quarter"):
        with pytest.raises(ValueError, match="such as n/4"):
            size_of(wrong, 8192)


def test_a_sweep_has_every_size_of_what_has_blocks():
    config = EvaluateConfig(**COMMON, compare=("dense", "star", "ring"), block_sizes=("n/4", 512), anchor_sizes=(0,))
    contenders = config.contenders()
    assert [each.name for each in contenders] == ["dense", "star n/4 anchor 0", "star 512 anchor 0", "ring"]
    settings = contenders[1].settings(AttentionConfig(), 4096)
    assert (settings.kind, settings.block_size, settings.anchor_size) == ("star", 1024, 0)


def test_an_anchor_is_no_larger_than_its_block_at_any_length():
    sizes = {"block_sizes": ("n/4", 512), "anchor_sizes": ("n/8", 512)}
    names = [
        each.name for each in EvaluateConfig(**COMMON, compare=("star",), lengths=(2048, 8192), **sizes).contenders()
    ]
    assert names == ["star n/4 anchor n/8", "star n/4 anchor 512", "star 512 anchor 512"]


def test_a_sweep_over_what_stands_in_the_anchor_s_place():
    """Of no anchor there is one kind, and dense has none at all."""
    anchors = {"anchors": ("first", "random", "first:previous"), "anchor_sizes": (0, 64)}
    config = EvaluateConfig(**COMMON, compare=("dense", "star:recompute", "summary"), block_sizes=("n/4",), **anchors)
    contenders = config.contenders()
    star = "star:recompute n/4 anchor"
    assert [each.name for each in contenders] == [
        "dense",
        *(f"{star} {rest}" for rest in ("0", "64 first", "64 random", "64 first:previous")),
        *(f"summary n/4 anchor {size}" for size in (0, 64)),
    ]
    settings = [each.settings(AttentionConfig(), 4096) for each in contenders[3:5]]
    assert [(each.anchor_content, each.anchor_positions) for each in settings] == [
        ("random", "first"),
        ("first", "previous"),
    ]


@pytest.mark.parametrize(
    ("contender", "parts"),
    [
        ("dense", ("dense", "")),
        ("star n/4", ("star", "n/4")),
        ("star:recompute 512 anchor n/8 random overlap 64", ("star:recompute anchor n/8 random overlap 64", "512")),
        ("star overlap 64", ("star overlap 64", "")),
    ],
)
def test_blocks_are_told_apart_from_the_rest_of_a_name(contender, parts):
    assert report._parted(contender) == parts


def test_a_sweep_over_overlaps():
    config = EvaluateConfig(
        **COMMON, compare=("dense", "star", "summary"), block_sizes=("n/4", 48), overlap_sizes=(0, 64)
    )
    contenders = config.contenders()
    assert [each.name for each in contenders] == [
        "dense",
        *("star n/4 overlap 0", "star n/4 overlap 64", "star 48 overlap 0"),
        *("summary n/4", "summary 48"),
    ]
    assert [each.settings(AttentionConfig(), 4096).overlap_size for each in contenders[1:3]] == [0, 64]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compare": ("sparse",)}, "sparse"),
        ({"compare": ("star:recompute",), "anchors": ("last",)}, "anchors: 'last' is unknown; known: first, previous"),
        ({"compare": ("star:recompute",), "anchors": ("first:",)}, "anchors: 'first:' is unknown"),
        ({"compare": ("star",), "anchors": ("first", "random")}, "set attention.anchor=recompute"),
        ({"compare": ()}, "compare is empty"),
        ({"block_sizes": (64,), "overlap_sizes": (128,)}, "nothing is left of star, because no block of block_sizes"),
        ({"block_sizes": (64,), "anchor_sizes": (128,)}, "nothing is left of star"),
        ({"tasks": ("vt", "vt")}, "tasks names something twice: vt, vt"),
        ({"lengths": (10,)}, "at least 64"),
        ({"samples": 0}, "samples=0"),
        ({"block_sizes": ("half",)}, "not 'half'"),
        ({"output": None}, "output=FOLDER"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{**COMMON, **values})


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(1).choice([0.0, 100.0], size=80, p=[0.2, 0.8])
    found = bootstrap(list(values))
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    assert found.mean == values.mean()
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=1.3)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=1.3)
    assert bootstrap([5.0] * 4) == bootstrap([5.0])


def words(text):
    return len(text.split())


def test_given_samples_that_are_none_are_refused_by_their_line(tmp_path):
    good = {"id": 1, "task": "own", "context": "a b c", "query": "d", "outputs": ["e"]}
    file = tmp_path / "given.jsonl"
    config = EvaluateConfig(**COMMON, input=str(file), lengths=(64, 128))
    file.write_text(json.dumps(good) + "\n")
    (asked,) = given(config, words)
    assert (asked.length, asked.max_tokens) == (64, 128)
    assert (asked.score("it is E"), asked.score("f")) == (100, 0)
    for wrong, message in (
        ({**good, "outputs": "e"}, "line 2: outputs must be a list of texts"),
        ({**good, "query": ""}, "line 2: context and query must be texts"),
        ({"id": 2}, "line 2 has no field 'context'"),
        (good, "line 2: id '1' of task 'own' comes twice"),
        ([], "line 2"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            list(given(config, words))


def test_tasks_are_made_by_name():
    config = EvaluateConfig(**COMMON, tasks=("niah_single_1", "vt"), lengths=(1024,), samples=2)
    found = list(made(config, words))
    assert [(asked.task, asked.length) for asked in found] == [("niah_single_1", 1024)] * 2 + [("vt", 1024)] * 2
    assert all(asked.score(" ".join(asked.outputs)) == 100 for asked in found)
    with pytest.raises(ValueError, match="'niah' is unknown; known: niah_single_1"):
        list(made(EvaluateConfig(**COMMON, tasks=("niah",)), words))


def line(score, seconds):
    return {"score": score, "prefill_seconds": seconds, "ranks": 2}


def filled(journal):
    for number in range(20):
        for contender, score, seconds in (("dense", 100.0, 2.0), ("star", 100.0 * (number % 4 > 0), 1.0)):
            for task in ("one", "two"):
                journal.add((contender, task, 4096, str(number)), line(score, seconds))
    return journal


def test_differences_are_paired_and_times_compared(tmp_path):
    journal = Journal(tmp_path / "out", {"seed": 1}, resume=False, overwrite=False)
    journal.open()
    filled(journal)
    journal.add(("dense", "one", 4096, "unpaired"), line(0.0, 2.0))
    found = {(cell.contender, cell.task): cell for cell in cells(journal.lines, ["dense", "star"])}
    assert found["star", "one"].score.mean == 75
    assert found["star", "one"].difference.mean == -25
    assert found["star", "one"].difference.low < -25 < found["star", "one"].difference.high <= 0
    assert found["star", ALL_TASKS].samples == 40
    assert found["star", ALL_TASKS].speedup == 2
    assert found["dense", "one"].difference is None
    assert found["dense", "one"].samples == 21
    text = markdown(found.values(), "dense", "About.")
    assert "| one | star | 20 | 75.0 [" in text
    assert len(comma_separated(found.values()).splitlines()) == 1 + len(found)
    assert write_report(tmp_path / "out", journal.lines, ["dense", "star"], about="About.").startswith("# Accuracy")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "samples.jsonl",
        "sweep.json",
        "report.md",
        "report.csv",
        "frontier.png",
    }


def test_an_interrupted_journal_goes_on_and_another_sweep_s_does_not(tmp_path):
    folder = tmp_path / "out"
    journal = Journal(folder, {"seed": 1, "sizes": (1, 2)}, resume=True, overwrite=False)
    journal.open()
    filled(journal)
    whole = (folder / SAMPLES_FILE).read_bytes()
    (folder / SAMPLES_FILE).write_bytes(whole[: len(whole) // 2])  # within a line
    with pytest.raises(ValueError, match="resume=true"):
        Journal(folder, {"seed": 1, "sizes": (1, 2)}, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="other keys: seed"):
        Journal(folder, {"seed": 2, "sizes": (1, 2)}, resume=True, overwrite=False)
    again = Journal(folder, {"seed": 1, "sizes": (1, 2)}, resume=True, overwrite=False)
    missing = [key for key in journal.lines if key not in again.lines]
    assert 0 < len(missing) < len(journal.lines)
    again.open()
    for key in missing:
        again.add(key, line(journal.lines[key]["score"], journal.lines[key]["prefill_seconds"]))
    assert (folder / SAMPLES_FILE).read_bytes() == whole
    assert again.lines == journal.lines
    assert all(json.loads(text) for text in whole.decode().splitlines())


def test_no_context_outlives_its_samples(demo, tmp_path, monkeypatch):
    """Not even until Python collects what refers to itself: 8K tokens of every sample would fill the memory."""
    alive, following = [], sweep._Sweep._next

    def next_of(self, contender, size):
        alive.append(live_bytes())
        return following(self, contender, size)

    monkeypatch.setattr(sweep._Sweep, "_next", next_of)
    monkeypatch.setattr(sweep, "_BATCHES", 1)
    gc.collect()
    gc.disable()
    try:
        sizes = {"lengths": (512,), "samples": 3, "tasks": ("niah_single_1",)}
        inference = InferenceConfig(tokens_to_generate=4, max_batch_size=1)
        sweep.run(EvaluateConfig(checkpoint=str(demo), output=str(tmp_path / "out"), inference=inference, **sizes))
    finally:
        gc.enable()
    assert len(alive) == 2 * 4
    assert len(set(alive)) == 1
