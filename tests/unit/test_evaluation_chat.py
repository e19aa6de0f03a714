"""RULER's samples in a chat template: as the tokenizer's own `apply_chat_template`, and as RULER's templates."""

import shutil

import pytest
from chat import save_tokenizer, template
from launch import read_jsonl

from nemo_star.config.evaluate import EvaluateConfig
from nemo_star.evaluation.chat import in_template, template_tokens
from nemo_star.evaluation.samples import given, made
from nemo_star.text.tokenizer import Tokenizer

TASKS = ("niah_single_1", "vt", "cwe", "fwe")
LENGTH = 4096
RULER = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3": "<|user|>\n{}<|end|>\n<|assistant|>\n",
}
"""scripts/data/template.py of NVIDIA/RULER, less what stands before the user's turn."""
COMMON = {"checkpoint": "x", "output": "y", "chat": True}


@pytest.fixture(scope="module", params=["llama3", "mistral", "chatml", "gemma", "phi3"])
def family(request, tmp_path_factory):
    return request.param, Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


def words(text):
    return len(text.split())


def asked(tokenizer, count=words, **values):
    config = EvaluateConfig(**{**COMMON, "tasks": TASKS, "lengths": (LENGTH,), "samples": 1, **values})
    return list(made(config, count, template_tokens=template_tokens(tokenizer, None)))


def test_ids_are_those_of_the_template_and_the_answer_s_first_words(family):
    name, tokenizer = family
    for sample in asked(tokenizer):
        task = sample.context + sample.query.removesuffix(sample.answer_prefix)
        message = {"role": "user", "content": task}
        rendered = tokenizer.hf.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        if name in RULER:
            assert rendered.endswith(RULER[name].format(task))
        context, query = in_template(tokenizer, sample, None)
        expected = tokenizer.hf.encode(rendered + sample.answer_prefix, add_special_tokens=False)
        assert context + query == expected
        assert sample.answer_prefix.startswith((" The special magic number for", " Answer: "))
        # The cut is where it is without a template: after the line break that ends the haystack.
        text = tokenizer.hf.decode(query)
        assert text.startswith(sample.query[:20])
        assert text.endswith(sample.answer_prefix)


def test_the_template_counts_within_the_length(family):
    _, tokenizer = family

    def count(text):
        return len(tokenizer.encode_query(text))

    (sample,) = asked(tokenizer, count, tasks=("niah_single_1",), lengths=(1024,))
    tokens = sum(map(len, in_template(tokenizer, sample, None))) + sample.max_tokens
    # A step of the search is five sentences of noise.
    assert (
        1024 - 5 * count("\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.")
        < tokens
    )
    assert tokens <= 1024


def test_variables_reach_the_template(family, monkeypatch):
    _, tokenizer = family
    monkeypatch.setattr(tokenizer.hf, "chat_template", "{{ greeting }}" + tokenizer.hf.chat_template)
    assert template_tokens(tokenizer, {"greeting": "whale " * 9}) > template_tokens(tokenizer, {"greeting": ""}) + 8
    sample = asked(tokenizer, tasks=("vt",))[0]
    context, _ = in_template(tokenizer, sample, {"greeting": "Read."})
    assert tokenizer.hf.decode(context).startswith("Read.")


def test_given_samples_of_other_tasks_have_no_first_words(family, tmp_path):
    _, tokenizer = family
    source = tmp_path / "given.jsonl"
    source.write_text(
        '{"id": 1, "task": "own", "context": "The whale.", "query": "Who? Answer: it", "outputs": ["a"]}\n'
    )
    (sample,) = given(EvaluateConfig(**COMMON, input=str(source)), words)
    context, query = in_template(tokenizer, sample, None)
    message = {"role": "user", "content": "The whale.Who? Answer: it"}
    rendered = tokenizer.hf.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert context + query == tokenizer.hf.encode(rendered, add_special_tokens=False)


def test_a_checkpoint_without_a_template_is_refused(demo, tmp_path):
    from nemo_star.evaluation.run import run

    with pytest.raises(ValueError, match="chat=true needs a chat template"):
        run(EvaluateConfig(checkpoint=str(demo), output=str(tmp_path / "out"), chat=True))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="give chat=true"):
        EvaluateConfig(**{**COMMON, "chat": False, "chat_template": True})


def test_a_sweep_in_a_template(demo, tmp_path, capsys):
    from nemo_star.evaluation.run import run

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo, checkpoint)
    (checkpoint / "hf" / "chat_template.jinja").write_text(template("llama3"))
    sweep = {"compare": ("dense", "star"), "tasks": ("niah_single_1",), "lengths": (512,), "samples": 2}
    lines = {}
    for chat in (False, True):
        folder = tmp_path / f"chat {chat}"
        run(EvaluateConfig(checkpoint=str(checkpoint), output=str(folder), chat=chat, **sweep))
        lines[chat] = read_jsonl(folder / "samples.jsonl")
    for line in lines[True]:
        assert line["context_tokens"] + line["query_tokens"] + 128 <= 512
    tokens = {chat: [line["query_tokens"] for line in of] for chat, of in lines.items()}
    assert min(tokens[True]) > max(tokens[False]) + 20
    assert "niah_single_1" in capsys.readouterr().out
