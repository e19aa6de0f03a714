"""RULER's tasks: prompts equal to the official ones, what each task promises, scores."""

import functools
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from ruler_data import count_words, write_data

from nemo_star.evaluation.metrics import METRICS
from nemo_star.evaluation.ruler import tasks
from nemo_star.evaluation.ruler.niah import DEPTHS, Niah
from nemo_star.evaluation.ruler.sources import WordPairs
from nemo_star.evaluation.sentences import split_sentences
from nemo_star.evaluation.tasks import samples

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RECORDED = json.loads((REPOSITORY / "tests/data/ruler.json").read_text())
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
TOKENS = 4096


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def made(data):
    """Samples of a task by its name, made once."""
    return functools.cache(lambda name: make(name, data))


def make(name, data=None, *, star_paper=False, **settings):
    settings = {"tokens": TOKENS, "count": 4, "count_tokens": count_words, "data": data, **settings}
    return list(samples(tasks(star_paper=star_paper)[name], **settings))


@functools.cache
def demo_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REPOSITORY / "assets/demo_model")


def count_demo(text):
    return len(demo_tokenizer().tokenize(text))


# Prompts


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda case: "-".join(map(str, list(case.values())[:-1])).replace(" ", "")
)
def test_prompts_are_those_of_the_official_scripts(case, data):
    count = count_words if case["tokenizer"] == "words" else count_demo
    star = case["scripts"] == "Star-Attention"
    wanted = case["prompts"]
    found = make(
        case["task"],
        data,
        star_paper=star,
        tokens=case["tokens"],
        seed=case["seed"],
        count=len(wanted),
        count_tokens=count,
        template_tokens=case.get("template_tokens", 0),
    )
    prompts = [sample.context + sample.query for sample in found]
    assert [len(prompt) for prompt in prompts] == [prompt["characters"] for prompt in wanted]
    assert [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts] == [
        prompt["sha256"] for prompt in wanted
    ]
    assert [sample.outputs for sample in found] == [prompt["outputs"] for prompt in wanted]
    if not star:  # whose scripts count fwe's and vt's otherwise
        generated = tasks()[case["task"]].tokens_to_generate
        assert [sample.tokens + generated for sample in found] == [prompt["length"] for prompt in wanted]


def test_there_are_13_tasks():
    names = [f"niah_{kind}" for kind in ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")]
    assert list(tasks()) == [*names, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    generated = {task.name: task.tokens_to_generate for task in tasks().values() if task.family is not Niah}
    assert generated == {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert {task.tokens_to_generate for task in tasks().values() if task.family is Niah} == {128}
    assert tasks(star_paper=True)["fwe"].tokens_to_generate == 120
    assert tasks(star_paper=True)["cwe"].options["freq_cw"] == 300


@pytest.mark.parametrize("name", tasks())
def test_a_prompt_is_as_long_as_its_target_allows(name, made):
    task, found = tasks()[name], made(name)
    lengths = [sample.tokens + task.tokens_to_generate for sample in found]
    assert max(lengths) <= TOKENS
    assert max(lengths) >= 0.99 * TOKENS
    assert [sample.tokens for sample in found] == [count_words(sample.context + sample.query) for sample in found]
    assert [sample.id for sample in found] == [f"{name}-{number}" for number in range(4)]
    assert {sample.task for sample in found} == {name}


@pytest.mark.parametrize("name", tasks())
def test_the_cut_is_before_the_question(name, made):
    for sample in made(name):
        assert sample.context.endswith("\n")
        assert sample.query.startswith(("What ", "Question: ", "Answer the question"))
        assert sample.query.endswith((" is", " are", "they are: ", ":"))


@pytest.mark.parametrize("name", tasks())
def test_references_are_in_the_context(name, made):
    for sample in made(name):
        assert sample.outputs
        assert all(output in sample.context for output in sample.outputs)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multivalue", "vt", "cwe", "fwe", "qa_1"])
def test_a_seed_decides(name, made, data):
    assert make(name, data, count=2) == made(name)[:2]
    assert make(name, data, count=2, seed=1) != made(name)[:2]


# Needles

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ASKED = {"niah_multivalue": (1, 4), "niah_multiquery": (4, 4)}
"""Keys asked for, references."""


def needles(sample):
    return [match.groups() for match in NEEDLE.finditer(sample.context)]


@pytest.mark.parametrize("name", [name for name in tasks() if name.startswith("niah")])
def test_needles_have_their_formats(name, made):
    kinds = {"niah_single_3": ("words", "uuids"), "niah_multikey_3": ("uuids", "uuids")}.get(name, ("words", "numbers"))
    formats = {"words": re.compile(r"[\w .']+-[\w '.-]+"), "numbers": re.compile(r"[1-9]\d{6}"), "uuids": UUID}
    keys, references = ASKED.get(name, (1, 1))
    for sample in made(name):
        found = needles(sample)
        for kind, key, value in found:
            assert kind == kinds[1]
            assert formats[kinds[0]].fullmatch(key)
            assert formats[kinds[1]].fullmatch(value)
        asked = [key for key in dict.fromkeys(key for _, key, _ in found) if f" {key}" in sample.query]
        assert len(asked) == keys
        assert sorted(sample.outputs) == sorted(value for _, key, value in found if key in asked)
        assert len(sample.outputs) == references
        word = "number" if kinds[1] == "numbers" else "uuid"
        one = f"What is the special magic {word} for {asked[0]} mentioned in the provided text?"
        many = "What are all the special magic numbers for "
        assert sample.query.startswith(one if references == 1 else many)
        assert sample.context.startswith("A special magic" if references == 1 else "Some special magic")


@pytest.mark.parametrize(
    ("name", "count", "keys"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 4),
        ("niah_multivalue", 4, 1),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_as_many_as_declared(name, count, keys, made):
    for sample in made(name):
        assert len(needles(sample)) == count
        assert len({key for _, key, _ in needles(sample)}) == keys


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_has_distinct_keys(name, made):
    for sample in made(name):
        keys = [key for _, key, _ in needles(sample)]
        assert len(keys) > 50
        assert len(set(keys)) == len(keys)


def test_depths_are_40_from_start_to_end():
    assert len(DEPTHS) == len(set(DEPTHS)) == 40
    assert (DEPTHS[0], DEPTHS[1], DEPTHS[-1]) == (0, 3, 100)


@pytest.mark.parametrize("name", ESSAYS)
def test_needles_in_essays_are_at_these_depths(name, made):
    for sample in made(name):
        sentences = split_sentences(sample.context.split("\n")[1])
        hidden = [number for number, sentence in enumerate(sentences) if NEEDLE.match(sentence)]
        haystack = len(sentences) - len(hidden)
        places = [number - before for before, number in enumerate(hidden)]
        assert set(places) <= {int(haystack * (depth / 100)) for depth in DEPTHS}
        assert len(hidden) == len(needles(sample))


def test_pairs_of_words_are_those_of_a_sorted_set():
    adjectives, nouns = ["b", "all", "all-round", "all-in", "a", "b"], ["zoo", "in-law", "law", "round-zoo", "zoo"]
    pairs = WordPairs(adjectives, nouns)
    assert list(pairs) == sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert len(pairs) == len(list(pairs))


def test_sentences_joined_are_the_text():
    text = 'He said "Stop!" to Mr. Smith, at 3.5 p.m. sharp. "Why?" Dr. J. Doe asked... Then (he left.) 7 came.'
    sentences = split_sentences(text)
    assert " ".join(sentences) == text
    assert sentences == [
        'He said "Stop!" to Mr. Smith, at 3.5 p.m. sharp.',
        '"Why?"',
        "Dr. J. Doe asked...",
        "Then (he left.)",
        "7 came.",
    ]


# The other families


def test_variables_are_a_chain_in_order(made):
    examples = set()
    for sample in made("vt"):
        example, _, context = sample.context.rpartition("Memorize and track")
        assigned = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", context)
        assert [name for name, _ in assigned] == sample.outputs
        assert [value for _, value in assigned[1:]] == sample.outputs[:-1]
        assert len(set(sample.outputs)) == 5
        assert all(len(name) == 5 for name in sample.outputs)
        assert assigned[0][1].isdigit()
        assert len(assigned[0][1]) == 5
        assert f"assigned the value {assigned[0][1]}, they are: " in sample.query
        answered = example.strip().split()[-5:]
        assert set(answered) == {name for name, _ in re.findall(r"VAR ([A-Z]{3}) = (\w+)", example)}
        assert "12345" not in example
        examples.add(example)
    assert len(examples) == 4


def test_common_words_are_ten_times_as_frequent(made):
    for sample in made("cwe"):
        example, listed = sample.context.split("Memorize the ones that appear most often.\n")[1:]
        counts = Counter(re.findall(r"\d+\. (\S+(?: [^\d\s]\S*)*)", listed))
        assert Counter(counts.values()).keys() == {30, 3}
        assert {word for word, count in counts.items() if count == 30} == set(sample.outputs)
        assert len(sample.outputs) == 10
        answered = example.split("most often in the list are:")[1]
        assert answered.startswith(" 1. ")
        assert "10. " in answered


def test_frequent_words_are_the_first_three_after_the_dots(made):
    for sample in made("fwe"):
        coded = sample.context.split("coded words. ")[1].split()
        ordered = [word for word, _ in Counter(coded).most_common(4)]
        assert ordered == ["...", *sample.outputs]
        assert all(re.fullmatch("[a-z]{6}", word) for word in sample.outputs)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_are_numbered_and_the_question_s_own_is_there(name, made):
    for number, sample in enumerate(made(name)):
        numbers = [int(found) for found in re.findall(r"^Document (\d+):$", sample.context, re.M)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > 10
        if name == "qa_1":
            part = re.search(r"What is (\d+ \d+) possible\?", sample.query)[1]
            assert f"Part {part}. " in sample.context
        else:
            assert f"Who is {number}?" in sample.query


@pytest.mark.parametrize("name", ["vt", "cwe", "fwe"])
def test_the_star_paper_s_prompts_depart(name):
    ours, theirs = make(name, count=1, tokens=16384)[0], make(name, count=1, tokens=16384, star_paper=True)[0]
    assert ours.context != theirs.context
    assert ("assgined" in theirs.query) == (name == "vt")
    if name == "cwe":
        listed = theirs.context.split("Memorize the ones that appear most often.\n")[-1]
        counts = Counter(re.findall(r"\d+\. (\S+)", listed))
        assert set(counts.values()) <= {300, 30}


# Scores


def score(name, prediction, references):
    return METRICS[tasks()[name].metric](prediction, references, "")


def test_all_references_count_or_the_best():
    prediction, references = "It is Alpha and\x02BETA.", ["alpha", "beta", "gamma"]
    assert score("niah_multivalue", prediction, references) == pytest.approx(66.67, abs=0.01)
    assert score("qa_1", prediction, references) == 100
    assert score("qa_1", "none", ["one"]) == 100
    assert score("qa_1", "x", references) == 0
    assert {task.name for task in tasks().values() if task.metric == "part"} == {"qa_1", "qa_2"}


def test_a_score_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one reference"):
        score("vt", "a", [])


# Errors


@pytest.mark.parametrize(
    ("name", "file", "source"),
    [
        ("niah_single_2", "PaulGrahamEssays.json", "download_paulgraham_essay.py"),
        ("qa_1", "squad.json", "dev-v2.0.json"),
        ("qa_2", "hotpotqa.json", "hotpot_dev_distractor_v1.json"),
    ],
)
def test_a_missing_file_is_named_with_its_source(name, file, source, tmp_path):
    with pytest.raises(ValueError, match=f"a folder `data` with {file} .*{source}"):
        make(name)
    with pytest.raises(ValueError, match=f"{file} is missing: put there .*{source}"):
        make(name, tmp_path)
    (tmp_path / file).write_text("no JSON")
    with pytest.raises(ValueError, match=f"{file} has not the format"):
        make(name, tmp_path)
    (tmp_path / file).write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match=f"{file} has not the format"):
        make(name, tmp_path)


def test_more_words_than_wonderwords_has_come_from_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"english_words\.json"):
        make("cwe", tokens=80_000)
    words = {str(number): "".join(letters) for number, letters in enumerate(itertools.permutations("rstlnea", 6))}
    words.update({f"x{number}": f"word{number}" for number in range(10_000)})
    (tmp_path / "english_words.json").write_text(json.dumps(words))
    assert make("cwe", tmp_path, tokens=80_000, count=1)


def test_without_wonderwords_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
    with pytest.raises(ValueError, match=r"nemo-star\[eval\]"):
        make("cwe")


@pytest.mark.parametrize("name", [*OFFLINE, "qa_2"])
def test_a_target_that_is_too_short_is_refused(name, data):
    with pytest.raises(ValueError, match="give more"):
        make(name, data, tokens=160)


def test_more_samples_than_questions_are_refused(data):
    with pytest.raises(ValueError, match="20 samples of 12 questions"):
        make("qa_2", data, count=20)
