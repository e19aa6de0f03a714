"""Contexts saved at one layout and loaded at others, in windowed models, too; killed while saving; a store on ranks."""

import json
import shutil

import pytest
import torch
from family_models import save_model, tokens
from launch import ROOT, forked, selected
from safetensors.torch import load_file

STAR = {"kind": "star", "block_size": 16}
RING = {"kind": "ring"}
CASES = {
    "star": ("qwen2", STAR, [101]),
    "star recomputed": ("qwen2", {**STAR, "anchor": "recompute", "anchor_size": 7}, [101]),
    "star, appended": ("qwen2", STAR, [50, 101]),
    "ring, appended": ("qwen2", RING, [70, 101]),
    "windowed": ("windowed", STAR, [101]),
    "windowed, appended": ("windowed", STAR, [50, 101]),
    "windowed, overlapping, appended": ("windowed", {**STAR, "anchor_size": 5, "overlap_size": 6}, [50, 101]),
    "windowed ring, appended": ("windowed", RING, [70, 101]),
}
"""Name -> (model, the group `attention`, where the parts end that the context is encoded in). A model is one of
`family_models.CASES`, or `windowed`: a family whose layers have windows is one more line."""
SLOW = ("star", "star recomputed", "ring, appended", "windowed", "windowed ring, appended")
REFUSED = "star, appended"
"""Of other weights."""
SAVED_AT = {"cp": (1, 2, 1), "tp x pp": (2, 1, 2), "dp": (1, 2, 1)}
LOADED_AT = {1: [(1, 1, 1)], 3: [(1, 3, 1)], 4: [(1, 4, 1), (2, 1, 2), (1, 2, 2)]}
IDS, MORE = tokens(101, 5), tokens(30, 6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Model -> a converted checkpoint. `windowed` is qwen2 with windows in its description."""
    from nemo_star.checkpoint.convert import import_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    models = {"qwen2"} | {model for model, *_ in CASES.values()} - {"windowed"}
    for model in models:
        save_model(folder / "hf" / model, model)
        import_checkpoint(folder / "hf" / model, folder / model)
    shutil.copytree(folder / "qwen2", folder / "windowed")
    file = folder / "windowed" / "nemo_star.json"
    description = json.loads(file.read_text())
    description["model"] |= {"window_size": 9, "windowed_layers": [0, 2]}
    file.write_text(json.dumps(description))
    return {name: folder / name for name in (*models, "windowed")}


class Job:
    """Runs of the worker in one launch."""

    def __init__(self, checkpoints, folder):
        self.checkpoints, self.folder, self.runs, self.keys = checkpoints, folder, [], []

    def add(self, key, do, checkpoint, attention, layout, **values):
        tp, cp, pp = layout
        sizes = {"tensor_model": tp, "context": cp, "pipeline_model": pp}
        parallel = {f"{name}_parallel_size": size for name, size in sizes.items()}
        run = {"do": do, "checkpoint": str(self.checkpoints[checkpoint]), "attention": attention, "parallel": parallel}
        self.runs.append({**run, "ids": IDS, "more": MORE, **values})
        self.keys.append(key)

    def launch(self, processes):
        """What went wrong, if anything."""
        self.requests, self.output = self.folder / "requests.json", self.folder / "found.json"
        self.requests.write_text(json.dumps(self.runs))
        arguments = (ROOT / "tests/workers/saved_contexts.py", self.requests, self.output)
        return forked(processes, *arguments)

    def results(self, processes):
        """Key -> what the run gave: text or numbers, or {name: (tokens, logits), at once and gone on}."""
        done = self.launch(processes)
        assert done.returncode == 0, done.stderr
        logits, found = load_file(f"{self.output}.logits"), {}
        for number, (key, result) in enumerate(zip(self.keys, json.loads(self.output.read_text()), strict=True)):
            if isinstance(result, dict):
                result = {
                    name: [(each, logits[f"{number}/{name}/{when}"]) for each, when in zip(pair, WHEN, strict=True)]
                    for name, pair in result.items()
                }
            found[key] = result
        return found


WHEN = ("at once", "gone on")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def found(request, checkpoints, folder, tmp_path_factory):
    """(what, case, layout...) -> result of a run."""
    cases = {case: CASES[case] for case in sorted(selected(request, "case") | {REFUSED})}

    def job():
        return Job(checkpoints, tmp_path_factory.mktemp("job"))

    def saves(to, name):
        for case, (checkpoint, attention, ends) in cases.items():
            values = {"ends": ends, "folder": str(folder / name / case)}
            to.add(("saved", name, case), "save", checkpoint, attention, SAVED_AT[name], **values)

    two, four = job(), job()
    saves(two, "cp")
    for name, place in (("without a folder", None), ("with a folder", str(folder / "store"))):
        two.add(("walk", name), "walked", "qwen2", {"block_size": 32}, (1, 2, 1), folder=place)
    results = two.results(2)
    saves(four, "tp x pp")
    saves(four, "dp")
    four.add(("walk", "windowed"), "walked", "windowed", {"block_size": 32}, (1, 2, 2), folder=str(folder / "windows"))
    for processes, layouts in LOADED_AT.items():
        to = four if processes == 4 else job()
        for layout in layouts:
            for name in SAVED_AT if processes == 4 else ["cp"]:
                for case, (checkpoint, attention, _) in cases.items():
                    values = {"folder": str(folder / name / case)}
                    to.add(("loaded", name, case, layout), "load", checkpoint, attention, layout, **values)
        if processes == 3:
            other = {"folder": str(folder / "cp" / REFUSED), "fingerprint": "others"}
            to.add("other weights", "refuse", "qwen2", STAR, (1, 3, 1), **other)
            to.add("nothing", "refuse", "qwen2", STAR, (1, 3, 1), folder=str(folder / "nothing"))
        results |= to.results(processes)
    return results


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_a_context_answers_alike_wherever_it_was_saved_and_is_loaded(found, case):
    expected = found["saved", "cp", case]["saved"]
    compared = 0
    for key, result in found.items():
        if key[0] in ("saved", "loaded") and key[2] == case:
            for name, pair in result.items():
                for (right, rows), (given, logits), when in zip(expected, pair, WHEN, strict=True):
                    assert given == right, (key, name, when)
                    assert (logits - rows).abs().max() <= 5e-4, (key, name, when)
                    compared += 1
    assert compared == 2 * (2 * len(SAVED_AT) + 1 + 1 + 3 * len(SAVED_AT))


@pytest.mark.parametrize("place", ["without a folder", "with a folder", "windowed"])
def test_a_random_walk_over_five_texts_on_ranks(found, place):
    worst, encoded = found["walk", place]
    assert worst <= 5e-4
    assert (encoded > 5) if place == "without a folder" else (encoded <= 5)


def test_refusals_are_the_same_on_all_ranks(found):
    assert "belongs to other weights (fingerprint weights..., this model's is others...)" in found["other weights"]
    assert found["nothing"].endswith("holds no saved context: it has no index.json")


@pytest.mark.parametrize(("processes", "rank", "at"), [(2, 1, "file"), (1, 0, "index")])
def test_killed_while_saving_the_old_context_is_there(checkpoints, tmp_path, processes, rank, at):
    from nemo_star import LLM
    from nemo_star.contexts.storage import load_context, save_context

    place = tmp_path / "book"
    job = Job(checkpoints, tmp_path)
    job.add("kill", "kill", "qwen2", STAR, (1, processes, 1), folder=str(place), rank=rank, at=at)
    assert job.launch(processes).returncode != 0
    # A rank that outlives the other removes what was written; where none does, it lies beside what is named.
    if processes == 1:
        assert len(list(place.iterdir())) == 4
    engine = LLM(checkpoints["qwen2"], attention=STAR).engine
    context = load_context(engine, place, fingerprint="weights", verify=True)
    assert context.ids.tolist() == IDS[:50]
    one, other = (engine.decode([(engine.sequence(each), [5])]) for each in (context, engine.encode(IDS[:50])))
    assert torch.allclose(one, other, atol=5e-4)
    save_context(engine, context, place, fingerprint="weights")
    assert len(list(place.iterdir())) == 2
