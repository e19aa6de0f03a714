"""The contract of tools/generate.py on token ids: JSON lines in and out, resuming, sampling, errors."""

import json
import re
import shutil

import pytest
import torch
from launch import ROOT, generate_many, read_jsonl, torchrun, write_jsonl
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = [(7 * i * i + 3 * i) % 251 for i in range(120)]
QUESTIONS = [{"id": f"q{i}", "context_ids": CONTEXT, "query_ids": [3 + i, 4, 5], "length": i} for i in range(5)]
BAD_LINES = [
    {"id": "empty", "context_ids": [], "query_ids": [1], "note": "kept"},
    {"context_ids": [1], "query_ids": [999]},
    {"id": "text", "context": "a", "query": "b"},
]


class Runs:
    """Named runs of one launch, prepared first, looked up after it."""

    def __init__(self, folder, checkpoint):
        self.folder, self.checkpoint = folder, checkpoint
        self.arguments, self.results = {}, {}

    def add(self, name, *overrides, rows=QUESTIONS, output=None, checkpoint=None):
        source = write_jsonl(self.folder / f"{name}.in.jsonl", rows)
        out = output or self.folder / f"{name}.jsonl"
        paths = [f"checkpoint={checkpoint or self.checkpoint}", f"input={source}", f"output={out}"]
        short = ["attention.block_size=32", "inference.tokens_to_generate=6"]
        self.arguments[name] = [*paths, *short, *overrides]

    def launch(self):
        results = generate_many(2, list(self.arguments.values()), self.folder)
        self.results = dict(zip(self.arguments, results, strict=True))

    def lines(self, name):
        return read_jsonl(self.folder / f"{name}.jsonl")


def with_end_token(checkpoint, folder, token):
    """A copy of the checkpoint whose answers end with `token`."""
    copy = shutil.copytree(checkpoint, folder)
    (copy / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [token]}))
    return copy


ERRORS = {
    "exists": ([], "exists: give another file or resume=true (continue it) or overwrite=true"),
    "both": (["resume=true", "overwrite=true"], "contradict each other"),
    "no-input": (["input=missing.jsonl"], "missing.jsonl"),
    "no-folder": (["output=missing/out.jsonl"], "missing does not exist"),
    "a-folder": (["output=."], "output=. is a directory"),
    "no-checkpoint": (["checkpoint=missing"], "checkpoint missing does not exist"),
    "cp": (["parallel.context_parallel_size=3"], "world size 2 is not divisible by"),
    "dense-cp": (["attention=dense", "parallel.context_parallel_size=2"], "attention=ring and attention=ulysses"),
    "kernel": (["attention.kernel=flash"], "attention.kernel=flash does not run on cpu"),
    "merge": (["parallel.merge=triton"], "parallel.merge=triton does not run here (not on cpu)"),
    "anchor": (["attention.anchor_size=33"], "anchor_size=33 is larger than attention.block_size=32"),
    "end-strings": (["inference.end_strings=[x]"], "the checkpoint has no tokenizer"),
    "same-file": (["output=out.jsonl", "output_logits=./out.jsonl"], "output and output_logits are the same file"),
    "logits-device": (["output_logits=/dev/null", "overwrite=true"], "output_logits=/dev/null is no regular file"),
    "logits-twice": (["output_logits=l.safetensors"], "id 'q0' of line 2 is not the first"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("generate")
    runs = Runs(folder, tiny)
    runs.add("plain", f"output_logits={folder / 'plain.safetensors'}")
    runs.add("math", "attention.kernel=math", f"output_logits={folder / 'math.safetensors'}")
    runs.add("bf16-cache", "cache.dtype=bfloat16", f"output_logits={folder / 'bf16.safetensors'}")
    runs.add("bf16", "dtype=bfloat16", f"output_logits={folder / 'bf16-model.safetensors'}")
    runs.add("bad", rows=[QUESTIONS[0], *BAD_LINES, QUESTIONS[1]])
    runs.add("reference-names", rows=[{"index": 3, "context_ids": CONTEXT, "query_ids": [3, 4, 5]}])
    (folder / "overwritten.jsonl").write_text("old\n")
    runs.add("overwritten", "overwrite=true")
    runs.add("resumed", "resume=true")
    runs.add("complete", "resume=true", output=folder / "plain.jsonl")
    sampled = ["inference=sampled", "inference.temperature=1.5"]
    for name, extra in (("sampled", []), ("sampled-again", []), ("other-seed", ["inference.seed=7"])):
        runs.add(name, *sampled, "inference.tokens_to_generate=6", *extra)
    runs.add("same-question", *sampled, "inference.tokens_to_generate=6", rows=[QUESTIONS[0], QUESTIONS[0]])
    runs.add("small-block", "attention.block_size=8")
    long_row = {"id": 0, "context_ids": CONTEXT * 70, "query_ids": [1]}
    runs.add("long", "attention.block_size=1024", rows=[long_row])
    for name, (overrides, _) in ERRORS.items():
        runs.add(name, *overrides, rows=[QUESTIONS[0], QUESTIONS[0]])
    (folder / "exists.jsonl").write_text("old\n")
    (folder / "resumed.jsonl").write_text("")
    runs.launch()
    return runs


def without_stats(lines):
    return [{key: value for key, value in line.items() if key != "stats"} for line in lines]


def test_one_line_out_for_each_line_in(runs):
    assert runs.results["plain"]["code"] == 0
    lines = runs.lines("plain")
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(5)]
    for number, line in enumerate(lines):
        assert line["length"] == number  # passed through
        assert (line["context_tokens"], line["query_tokens"], len(line["token_ids"])) == (120, 3, 6)
        assert (line["text"], line["finish_reason"]) == (None, "length")
        stats = line["stats"]
        assert stats["kv_tokens_per_cp_rank"] == [64, 56]
        assert 0 < stats["prefill_seconds"] < stats["time_to_first_token_seconds"]
        assert stats["decode_tokens_per_second"] > 0


def test_logits_are_those_the_tokens_were_taken_from(runs):
    logits = load_file(runs.folder / "plain.safetensors")
    assert logits.keys() == {f"q{i}/logits" for i in range(5)}
    for line in runs.lines("plain"):
        rows = logits[f"{line['id']}/logits"]
        assert rows.shape == (6, 256)
        assert rows.dtype == torch.float32
        assert rows.argmax(-1).tolist() == line["token_ids"]


def test_kernels_agree(runs):
    cpu, math = (load_file(runs.folder / f"{name}.safetensors") for name in ("plain", "math"))
    assert max((cpu[name] - math[name]).abs().max() for name in cpu) <= 5e-4


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 0.1), ("bf16-model", 1.0)])
def test_bfloat16_is_near(runs, name, tolerance):
    exact, rounded = (load_file(runs.folder / f"{name}.safetensors") for name in ("plain", name))
    difference = max((exact[name][0] - rounded[name][0]).abs().max() for name in exact)
    assert 0 < difference <= tolerance


def test_bad_lines_are_answered_in_their_place(runs):
    assert runs.results["bad"]["code"] == 3
    assert runs.results["bad"]["stderr"].count("has an `error` field for each; exit code 3") == 1
    first, empty, unknown, text, last = runs.lines("bad")
    assert without_stats([first, last]) == without_stats(runs.lines("plain")[:2])
    assert empty == {"id": "empty", "note": "kept", "error": "the context is empty"}
    assert unknown["id"] is None
    assert "token id 999, outside the vocabulary of 256 tokens" in unknown["error"]
    assert "no tokenizer" in text["error"]


def test_names_of_the_published_reference_are_accepted(runs):
    (line,) = runs.lines("reference-names")
    assert line["id"] == 3
    assert line["token_ids"] == runs.lines("plain")[0]["token_ids"]


def test_overwriting_and_resuming_give_the_same_file(runs):
    expected = without_stats(runs.lines("plain"))
    assert without_stats(runs.lines("overwritten")) == expected
    assert without_stats(runs.lines("resumed")) == expected
    assert runs.results["complete"]["code"] == 0


def test_a_torn_output_is_continued(runs, tmp_path):
    whole = (runs.folder / "plain.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(whole[:2]) + whole[2][:30])
    arguments = [*runs.arguments["plain"][:2], "attention.block_size=32", "inference.tokens_to_generate=6"]
    done = torchrun(2, ROOT / "tools/generate.py", *arguments, f"output={tmp_path / 'out.jsonl'}", "resume=true")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"".join(whole[:2]))
    assert without_stats(read_jsonl(tmp_path / "out.jsonl")) == without_stats(runs.lines("plain"))


def test_sampling_depends_on_seed_and_line(runs):
    tokens = {name: [line["token_ids"] for line in runs.lines(name)] for name in ("sampled", "sampled-again")}
    assert tokens["sampled"] == tokens["sampled-again"]
    assert tokens["sampled"] != [line["token_ids"] for line in runs.lines("other-seed")]
    assert tokens["sampled"] != [line["token_ids"] for line in runs.lines("plain")]
    first, second = (line["token_ids"] for line in runs.lines("same-question"))
    assert first != second


def test_what_will_run_is_said_once_before_it_runs(runs):
    said = "star attention: 120 context tokens, 4 blocks of 32 tokens, anchor of 32 tokens (shared)"
    assert runs.results["plain"]["stderr"].count(said) == 1
    assert "kernel numba, float32" in runs.results["plain"]["stderr"]


def test_a_small_block_is_warned_of_once_with_its_unit(runs):
    assert runs.results["small-block"]["code"] == 0
    assert runs.results["small-block"]["stderr"].count("block_size is 8 tokens (tokens, not K)") == 1
    assert "warning" not in runs.results["plain"]["stderr"]


def test_a_context_beyond_the_trained_length_is_warned_of(runs):
    assert "take up to 8407 positions, the model was trained for 8192" in runs.results["long"]["stderr"]
    assert runs.lines("long")[0]["stats"]["kv_tokens_per_cp_rank"] == [5120, 3280]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_is_wrong_and_touch_nothing(runs, name):
    result = runs.results[name]
    assert result["code"] == 1
    assert ERRORS[name][1] in result["error"]
    assert "\n" not in result["error"]
    if name == "exists":
        assert (runs.folder / "exists.jsonl").read_text() == "old\n"
    else:
        assert not (runs.folder / f"{name}.jsonl").exists()


def test_an_end_token_ends_the_answer(runs, tmp_path, tiny):
    tokens = runs.lines("plain")[0]["token_ids"]
    ending = with_end_token(tiny, tmp_path / "ending", tokens[2])
    more = Runs(tmp_path, ending)
    more.add("ends", rows=QUESTIONS[:1])
    more.add("ignored", "inference.ignore_eos=true", rows=QUESTIONS[:1])
    more.launch()
    stop = tokens.index(tokens[2]) + 1
    (line,) = more.lines("ends")
    assert (line["token_ids"], line["finish_reason"]) == (tokens[:stop], "stop")
    (line,) = more.lines("ignored")
    assert (line["token_ids"], line["finish_reason"]) == (tokens, "length")


def test_prefill_never_computes_logits(tiny, monkeypatch):
    from nemo_star import LLM

    engine = LLM(tiny, attention={"block_size": 32}).engine
    heads = []
    head = engine.stage._head
    monkeypatch.setattr(engine.stage, "_head", lambda hidden: heads.append(hidden.shape[0]) or head(hidden))
    context = engine.encode(CONTEXT)
    assert heads == []
    list(engine.generate(context, [1, 2, 3], max_tokens=4, choose=lambda logits: (5, False)))
    assert heads == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_context_of_100k_tokens_stays_under_3_gb_a_rank(tmp_path):
    """The demo model's shape, two ranks; block 4,096."""
    from nemo_star.checkpoint.convert import import_checkpoint

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=1536, hidden_size=192, intermediate_size=512, max_position_embeddings=8192, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "checkpoint")
    row = {"id": 0, "context_ids": [i * i % 1500 for i in range(100_000)], "query_ids": [1, 2, 3]}
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    arguments = ["attention.block_size=4096", "inference.tokens_to_generate=3", "inference.ignore_eos=true"]
    paths = [f"checkpoint={tmp_path / 'checkpoint'}", f"input={source}", f"output={tmp_path / 'out.jsonl'}"]
    done = torchrun(2, ROOT / "tools/generate.py", *paths, *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = read_jsonl(tmp_path / "out.jsonl")
    assert sum(line["stats"]["kv_tokens_per_cp_rank"]) == line["context_tokens"] == 100_000
    peaks = re.search(r"peak memory per rank: (\d+) \+ (\d+) MiB", done.stderr)
    assert all(int(peak) < 3 * 1000**3 / 2**20 for peak in peaks.groups())
