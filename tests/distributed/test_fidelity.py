"""Fidelity against transformers in float64: divergences, lost mass, attention on first tokens, at several layouts; the
command on the demo model."""

import csv
import functools
import json
import random

import pytest
import torch
from family_models import greedy, save_model, tokens
from launch import ROOT, forked, read_jsonl, selected, write_jsonl
from star_masks import FULL, star_masks

from nemo_star.checkpoint.convert import import_checkpoint
from nemo_star.evaluation.needles import make_document, question

CONTEXT, QUERY, ANSWER = 61, 5, 6
CONTENDERS = {
    "even": {"block_size": 16, "anchor_size": 16},
    "small anchor": {"block_size": 20, "anchor_size": 6},
    "no anchor": {"block_size": 16, "anchor_size": 0},
    "recomputed": {"block_size": 25, "anchor_size": 25, "anchor": "recompute"},
    "one block": {"block_size": CONTEXT, "anchor_size": CONTEXT},
}
OVERLAP = {"block_size": 20, "anchor_size": 6, "overlap_size": 7}
FAMILIES = ("llama-yarn", "gpt-oss")
"""The second has windows in every other layer, and sinks."""
LAYOUTS = {"dp 2": (1, 1, 1), "cp 2": (1, 2, 1), "tp 2": (2, 1, 1), "pp 2": (1, 1, 2)}
QUICK = (("llama-yarn", "cp 2"),)
RUNS = [
    pytest.param(family, layout, marks=() if (family, layout) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for layout in LAYOUTS
]
FIRST = 16
TOLERANCE = 2e-5


class Oracle:
    """transformers' model, in float64, under masks."""

    def __init__(self, model, sample):
        self.model, self.sample = model, sample
        self.ids = [*sample["context"], *sample["query"], *sample["answer"]]
        kinds = getattr(model.config, "layer_types", None) or [FULL] * model.config.num_hidden_layers
        self.run = functools.cache(self._run)
        self.full = torch.tensor([kind == FULL for kind in kinds])

    def _run(self, block, anchor):
        """Logits [s, vocab]; attention [layers, heads, s, s], of windowed layers zeros."""
        window = getattr(self.model.config, "sliding_window", None)
        masks = star_masks(len(self.ids), CONTEXT, block=block, anchor=anchor, window=window)
        if getattr(self.model.config, "layer_types", None) is None:
            masks = masks[FULL]
        with torch.no_grad():
            out = self.model(torch.tensor([self.ids]), attention_mask=masks, use_cache=False, output_attentions=True)
        return out.logits[0], torch.cat(out.attentions) * self.full[:, None, None, None]

    def divergence(self, block, anchor, first, last):
        """KL and agreement where the tokens [first, last) are predicted."""
        ours, theirs = (self.run(*sizes)[0][first - 1 : last - 1] for sizes in ((CONTEXT, CONTEXT), (block, anchor)))
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), (ours.argmax(-1) == theirs.argmax(-1)).int().tolist()

    def lost(self, block, anchor, overlap=0):
        """[layers, heads, rows]: dense attention's mass on hidden keys."""
        attention = self.run(CONTEXT, CONTEXT)[1]
        rows = torch.arange(CONTEXT)
        hidden = (rows[None] >= anchor) & (rows[None] < (rows[:, None] // block) * block - overlap)
        return (attention[:, :, :CONTEXT, :CONTEXT] * hidden).sum(-1)

    def first_tokens(self, block, mask, where):
        """[layers, tokens]: under a mask, on first tokens of a block, or of the context, from what is later in it."""
        attention = self.run(*mask)[1].mean(1)
        count = min(FIRST, (block + 1) // 2)
        found = []
        for row in range(block, CONTEXT):
            start = row // block * block
            if row >= start + count:
                first = start if where == "block" else 0
                found.append(attention[:, row, first : first + count])
        return torch.stack(found).mean(0)


@pytest.fixture(scope="module")
def done(request, tmp_path_factory, demo):
    """The folder, oracles by family, lines by (family, layout), what the commands said."""
    folder = tmp_path_factory.mktemp("fidelity")
    sample = {"context": tokens(CONTEXT, 7), "query": tokens(QUERY, 8), "place": 33}
    oracles, runs, wanted = {}, [], sorted(selected(request, "family", "layout"))
    for family in {family for family, _ in wanted}:
        model = save_model(folder / family / "hf", family).double()
        import_checkpoint(folder / family / "hf", folder / family / "converted")
        answer = greedy(model, sample["context"] + sample["query"], ANSWER)[0]
        oracles[family] = Oracle(model, sample | {"answer": answer})
    for family, layout in wanted:
        answer = None if layout == "cp 2" else oracles[family].sample["answer"]  # None: as dense attention answers
        runs.append(
            {
                "checkpoint": str(folder / family / "converted"),
                "layout": LAYOUTS[layout],
                "sample": sample | {"answer": answer},
                "contenders": CONTENDERS | ({} if family == "gpt-oss" else {"overlap": OVERLAP}),
                "max_tokens": ANSWER,
                "rows": 1000,
            }
        )
    (folder / "runs.json").write_text(json.dumps({"measure": runs, "commands": commands(folder, demo)}))
    result = forked(2, ROOT / "tests/workers/fidelity.py", folder / "runs.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((folder / "results.json").read_text())
    return folder, oracles, dict(zip(wanted, results["measured"], strict=True)), results["commands"]


def commands(folder, demo):
    """Arguments of the command: given samples, an answer among them; the same resumed; a text."""
    rows = []
    for number in range(3):
        document = make_document(random.Random(f"fidelity {number}"), filler_sentences=30, needles=2)
        key, value = next(iter(document.needles.items()))
        rows.append({"id": number, "task": "own", "context": document.text, "query": question(key), "outputs": [value]})
    rows[2]["answer"] = f" {value}"
    write_jsonl(folder / "given.jsonl", rows)
    (folder / "text.txt").write_text(" ".join(row["context"] for row in rows), encoding="utf-8")
    common = [f"checkpoint={demo}", f"output={folder / 'out'}", f"input={folder / 'given.jsonl'}", "lengths=[1024]"]
    common += ["block_sizes=[n/2,128]", "rows=32", "sink_samples=1"]
    text = [f"checkpoint={demo}", f"output={folder / 'text'}", f"texts=[{folder / 'text.txt'}]", "lengths=[512]"]
    return [
        common,
        common,
        [*common, "resume=true"],
        [*text, "block_sizes=[128]", "samples=2", "answer_tokens=8", "sink_samples=0"],
    ]


def lines(done, family, layout, contender):
    return done[2][family, layout][contender]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("family", "layout"), RUNS)
def test_divergences_are_those_of_transformers(done, family, layout, contender):
    line, oracle = lines(done, family, layout, contender), done[1][family]
    sizes = CONTENDERS[contender]["block_size"], CONTENDERS[contender]["anchor_size"]
    start, end = CONTEXT + QUERY, CONTEXT + QUERY + ANSWER
    for kl, agree, first, last in (("kl", "agree", start, end), ("query_kl", "query_agree", CONTEXT + 1, start)):
        expected, same = oracle.divergence(*sizes, first, last)
        assert line[agree] == same
        torch.testing.assert_close(torch.tensor(line[kl]).double(), expected, atol=TOLERANCE, rtol=1e-3)
    assert line["given"] == (layout != "cp 2")
    if contender == "one block":
        assert max(line["kl"] + line["query_kl"]) < 1e-9
        assert min(line["agree"] + line["query_agree"]) == 1
    else:
        assert max(line["kl"]) > 1e-3


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("family", "layout"), RUNS)
def test_lost_mass_is_that_of_transformers(done, family, layout, contender):
    line, oracle = lines(done, family, layout, contender), done[1][family]
    block, anchor = CONTENDERS[contender]["block_size"], CONTENDERS[contender]["anchor_size"]
    lost = oracle.lost(block, anchor)
    by_head = lost[:, :, block:].mean(-1) if block < CONTEXT else torch.zeros(lost.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(line["lost"]).double(), by_head, atol=TOLERANCE, rtol=1e-4)
    by_block = torch.stack([part.mean((1, 2)) for part in lost.split(block, dim=2)], dim=1)
    torch.testing.assert_close(torch.tensor(line["lost_by_block"]).double(), by_block, atol=TOLERANCE, rtol=1e-4)
    assert (by_head.max() > 0.1) == (contender != "one block")
    attention = oracle.run(CONTEXT, CONTEXT)[1][:, :, CONTEXT + QUERY - 1 : -1, :CONTEXT].mean((0, 1, 2))
    attention[: min(FIRST, block)] = 0
    sums = torch.stack([part.sum() for part in attention.split(block)])
    torch.testing.assert_close(torch.tensor(line["mass_by_block"]).double(), sums, atol=TOLERANCE, rtol=1e-4)
    assert line["block"] == int(sums.argmax())
    assert line["known_block"] == 33 // block
    assert line["blocks"] == len(sums)


@pytest.mark.parametrize(("family", "layout"), [run for run in RUNS if run.values[0] == "llama-yarn"])
def test_what_a_block_overlaps_with_is_not_lost(done, family, layout):
    line, oracle = lines(done, family, layout, "overlap"), done[1][family]
    lost = oracle.lost(*OVERLAP.values())
    block = OVERLAP["block_size"]
    expected = lost[:, :, block:].mean(-1)
    torch.testing.assert_close(torch.tensor(line["lost"]).double(), expected, atol=TOLERANCE, rtol=1e-4)
    assert (expected < torch.tensor(lines(done, family, layout, "small anchor")["lost"])).all()


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "one block"])
@pytest.mark.parametrize(("family", "layout"), RUNS)
def test_attention_on_first_tokens_is_that_of_transformers(done, family, layout, contender):
    line, oracle = lines(done, family, layout, contender), done[1][family]
    block, anchor = CONTENDERS[contender]["block_size"], CONTENDERS[contender]["anchor_size"]
    masks = {"dense": (CONTEXT, CONTEXT), "no anchor": (block, 0)}
    if anchor:
        masks["anchor"] = (block, anchor)
    assert line["first_tokens"].keys() == masks.keys()
    for variant, mask in masks.items():
        for where in ("block", "start"):
            expected = oracle.first_tokens(block, mask, where)
            found = torch.tensor(line["first_tokens"][variant][where]).double()
            torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=TOLERANCE, rtol=1e-4)
            assert not found[:, expected.shape[1] :].any()


def test_the_command_writes_a_report_and_goes_on(done):
    folder, _, _, commands = done
    assert commands[0] is None
    assert "holds samples: resume=true" in commands[1]
    assert commands[2:] == [None, None]
    found = read_jsonl(folder / "out/samples.jsonl")
    assert [(line["contender"], line["id"]) for line in found[:2]] == [("star n/2", "0"), ("star 128", "0")]
    assert len(found) == 6
    assert [line["given"] for line in found if line["contender"] == "star 128"] == [False, False, True]
    assert ["first_tokens" in line for line in found if line["contender"] == "star 128"] == [True, False, False]
    assert all(line["known_block"] is not None for line in found)
    rows = list(csv.DictReader((folder / "out/summary.csv").open()))
    assert [row["contender"] for row in rows] == ["star n/2", "star 128"]
    assert float(rows[1]["lost"]) > float(rows[0]["lost"]) == 0  # of one block
    written = {file.name for file in (folder / "out").iterdir()}
    assert {"report.md", "heads.csv", "heads.png", "first_tokens.png", "positions.png", "blocks.csv"} <= written


def test_pieces_of_a_text_are_compared_on_what_follows(done):
    found = read_jsonl(done[0] / "text/samples.jsonl")
    assert [(line["id"], line["task"]) for line in found] == [("0", "text.txt"), ("1", "text.txt")]
    for line in found:
        assert (line["context_tokens"], line["query_tokens"], len(line["kl"])) == (512 - 32 - 8, 32, 8)
        assert line["given"]
        assert line["known_block"] is None
