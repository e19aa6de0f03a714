"""Tasks of BABILong, InfiniteBench and the like of MRCR: prompts, lengths, worlds, scores."""

import functools
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from babi_reader import answer
from ruler_data import count_words

from nemo_star.evaluation.babilong.stories import make_story, read_stories
from nemo_star.evaluation.fill import CLOSE, fill
from nemo_star.evaluation.metrics import GIFTS, METRICS, PLACES
from nemo_star.evaluation.needles import filler_sentence
from nemo_star.evaluation.ruler.niah import NOISE
from nemo_star.evaluation.tasks import samples, tasks

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RECORDED = json.loads((REPOSITORY / "tests/data/long_context.json").read_text())
BABI = {
    "qa1": "qa1_single-supporting-fact_test.txt",
    "qa2": "qa2_two-supporting-facts_test.txt",
    "qa3": "qa3_three-supporting-facts_test.txt",
    "qa4": "qa4_two-arg-relations_test.txt",
    "qa5": "qa5_three-arg-relations_test.txt",
}
FROM_FILES = [f"babilong_{stories}" for stories in BABI]
OFFLINE = [f"{name}_offline" for name in FROM_FILES]
INFINITE = ["passkey", "number_string", "kv_retrieval"]
MRCR = {"mrcr_like_2": 2, "mrcr_like_4": 4, "mrcr_like_8": 8}
OPENAI = ["mrcr_2", "mrcr_4", "mrcr_8"]
NEW = [*FROM_FILES, *OFFLINE, *INFINITE, *MRCR]
"""Whose haystacks are made to a length."""
TOKENS = 4096


def babi_file(stories, count):
    """As bAbI's own: numbered lines, several questions a story, a blank before the tab."""
    lines = []
    for seed in range(count):
        story = make_story(stories, random.Random(seed))
        numbers = [str(number + 1) for number in range(len(story.facts))]
        lines += [f"{number} {fact}" for number, fact in zip(numbers, story.facts, strict=True)]
        support = " ".join(numbers[number] for number in story.support)
        lines += [f"{len(numbers) + again} {story.question} \t{story.answer}\t{support}" for again in (1, 2)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(3)
    for stories, name in BABI.items():
        (folder / name).write_text(babi_file(stories, 20))
    (folder / "pg19").mkdir()
    for number in range(3):
        paragraphs = [" ".join(filler_sentence(rng) for _ in range(40)) for _ in range(20)]
        (folder / "pg19" / f"{number}.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture(scope="module")
def made(data):
    """Samples of a task by its name, made once."""
    return functools.cache(lambda name: make(name, data))


def make(name, data=None, **settings):
    settings = {"tokens": TOKENS, "count": 8, "count_tokens": count_words, "data": data, **settings}
    return list(samples(tasks()[name], **settings))


# All


def test_the_tasks_are_there():
    assert set(list(tasks())[13:]) == {*NEW, *OPENAI}
    assert {task.metric for task in tasks().values()} == set(METRICS)


@pytest.mark.parametrize("name", NEW)
def test_a_prompt_is_as_long_as_its_target_allows(name, made):
    found = made(name)
    lengths = [sample.tokens + tasks()[name].tokens_to_generate for sample in found]
    assert max(lengths) <= TOKENS
    assert min(lengths) >= 0.99 * TOKENS
    assert [sample.tokens for sample in found] == [count_words(sample.context + sample.query) for sample in found]
    assert [sample.id for sample in found] == [f"{name}-{number}" for number in range(8)]


@pytest.mark.parametrize("name", NEW)
def test_the_cut_is_after_the_haystack(name, made):
    begins = {"babilong": "</context>\n\nQuestion: ", "kv": 'Key: "', "mrcr": "User: Prepend "}
    for sample in made(name):
        assert sample.context.endswith("\n")
        assert sample.query.startswith(begins.get(re.split("_", name)[0], "What is the "))


@pytest.mark.parametrize("name", NEW)
def test_references_have_all_points_and_others_none(name, made):
    metric = METRICS[tasks()[name].metric]
    found = made(name)
    for sample, other in itertools.pairwise(found):
        assert metric(sample.outputs[0], sample.outputs, sample.query) == 100
        if sample.outputs != other.outputs:
            assert metric(other.outputs[0], sample.outputs, sample.query) == 0


@pytest.mark.parametrize("name", ["babilong_qa3", "babilong_qa5_offline", "passkey", "kv_retrieval", "mrcr_like_4"])
def test_a_seed_decides(name, made, data):
    assert make(name, data) == made(name)
    assert make(name, data, seed=1) != made(name)


@pytest.mark.parametrize("name", NEW)
def test_a_target_that_is_too_short_is_refused(name, data):
    with pytest.raises(ValueError, match=f"{name}: .* give more"):
        make(name, data, tokens=48)


@pytest.mark.parametrize("case", RECORDED["scores"], ids=lambda case: f"{case['metric']}: {case['prediction'][:40]}")
def test_scores_are_those_of_the_official_functions(case):
    found = METRICS[case["metric"]](case["prediction"], case["outputs"], case["query"])
    assert found == pytest.approx(case["score"])


# Lengths


@pytest.mark.parametrize("guess", [1, 70, 100, 5000])
def test_the_size_is_found_from_any_guess(guess):
    tried = []

    def tokens_of(size):
        tried.append(size)
        return 50 + 7 * size + size % 3

    for room in (60, 400, 757, 700_000):
        size = fill(tokens_of, room=room, guess=guess)
        assert tokens_of(size) <= room
        assert room - tokens_of(size) < room // CLOSE or tokens_of(size + 1) > room
    assert len(tried) < 60
    assert fill(tokens_of, room=49, guess=guess) is None
    assert fill(tokens_of, room=10_000, guess=guess, most=9) == 9


# BABILong


@pytest.mark.parametrize("stories", BABI)
def test_a_reader_of_the_facts_alone_gives_the_label(stories):
    rng = random.Random(7)
    for story in [make_story(stories, rng) for _ in range(200)]:
        assert answer(story.facts, story.question) == story.answer
        support = [story.facts[number] for number in story.support]
        assert answer(support, story.question) == story.answer
        for left_out in range(len(support)):
            without = support[:left_out] + support[left_out + 1 :]
            assert answer(without, story.question) != story.answer


@pytest.mark.parametrize(("stories", "support"), [("qa1", 1), ("qa2", 2), ("qa3", 3), ("qa4", 1), ("qa5", 1)])
def test_stories_are_as_varied_as_babi_s(stories, support):
    rng = random.Random(8)
    made = [make_story(stories, rng) for _ in range(600)]
    answers = Counter(story.answer for story in made)
    assert set(answers) == set(GIFTS if stories == "qa5" else PLACES)
    assert max(answers.values()) < 2.5 * min(answers.values())
    assert {len(story.support) for story in made} == {support}
    assert {len(story.facts) % 2 for story in made} == {0}
    names = r"\b(Mary|John|Sandra|Daniel|Fred|Bill|Jeff|apple|football|milk|" + "|".join(PLACES) + r")\b"
    forms = Counter(re.sub(names, "X", story.question) for story in made)
    assert len(forms) == {"qa4": 8, "qa5": 5}.get(stories, 1)
    assert {len(story.facts) for story in made} >= ({2} if stories == "qa4" else {4, 6, 8, 10})


def test_a_file_of_babi_is_read_question_by_question():
    text = (
        "1 Mary got the milk there.\n2 John moved to the bedroom.\n3 Sandra went back to the kitchen.\n"
        "4 Mary travelled to the hallway.\n5 Where is the milk? \thallway\t1 4\n6 John got the football there.\n"
        "7 John went to the hallway.\n8 Where is the football? \thallway\t6 7\n"
        "1 John went to the office.\n2 Where is John? \toffice\t1\n"
    )
    first, second, third = read_stories(text)
    assert (first.question, first.answer, first.support) == ("Where is the milk?", "hallway", (0, 3))
    assert second.facts == (*first.facts, "John got the football there.", "John went to the hallway.")
    assert (second.support, third.facts, third.support) == ((4, 5), ("John went to the office.",), (0,))


@pytest.mark.parametrize("name", [*FROM_FILES, *OFFLINE])
def test_facts_are_scattered_in_their_order(name, made, data):
    stories = name.split("_")[1]
    read = read_stories(babi_file(stories, 20))
    noise = set(re.findall(r"[^.]+\.", NOISE.replace(". ", ".")))
    for sample in made(name):
        text = sample.context.partition("<context>\n")[2].removesuffix("\n")
        question = sample.query.removeprefix("</context>\n\nQuestion: ")
        if name in OFFLINE:
            sentences = re.findall(r"[^.]+\.", text.replace(". ", "."))
            facts = [sentence for sentence in sentences if sentence not in noise]
            assert answer(facts, question) == sample.outputs[0]
            continue
        (story,) = {
            story
            for story in read
            if story.question == question and re.search(".*".join(map(re.escape, story.facts)), text)
        }
        assert sample.outputs == [story.answer]
        book = " ".join(text.split())
        for fact in story.facts:
            book = book.replace(f"{fact} ", "", 1)
        assert "Here we go." not in text  # of 4 tokens
        whole = [" ".join(file.read_text().split()) for file in (data / "pg19").iterdir()]
        parts = re.findall(r"(?:\S+ ){20}", book[len(" ".join(story.facts)) :])
        assert sum(any(part in each for each in whole) for part in parts) > 0.5 * len(parts)


def test_facts_are_anywhere():
    found = make("babilong_qa1_offline", count=40)
    places = [sample.context.index(f"{sample.query.split()[-1][:-1]} ") / len(sample.context) for sample in found]
    assert min(places) < 0.45
    assert max(places) > 0.6


def test_stories_that_are_too_long_are_left_out(data):
    short = make("babilong_qa5", data, tokens=320, count=5)
    assert max(sample.tokens for sample in short) <= 300
    with pytest.raises(ValueError, match="41 samples of 40 questions"):
        make("babilong_qa1", data, count=41)


def test_missing_files_are_named_with_their_source(tmp_path):
    with pytest.raises(ValueError, match="a folder `data` with qa2_two.*github.com/booydar/babilong.*_offline"):
        make("babilong_qa2")
    (tmp_path / BABI["qa2"]).write_text("1 Mary went to the office.\nthen what\n")
    with pytest.raises(ValueError, match="qa2_two-supporting-facts_test.txt has not the format"):
        make("babilong_qa2", tmp_path)
    (tmp_path / BABI["qa2"]).write_text(babi_file("qa2", 2))
    with pytest.raises(ValueError, match="pg19 is missing: .*PG-19.*deepmind-gutenberg"):
        make("babilong_qa2", tmp_path)
    (tmp_path / "pg19").mkdir()
    (tmp_path / "pg19" / "1.txt").write_text("Short. " * 50)
    with pytest.raises(ValueError, match="pg19 has not the format.*no book with sentences"):
        make("babilong_qa2", tmp_path)


# InfiniteBench


@pytest.mark.parametrize("case", RECORDED["prompts"], ids=lambda case: case["task"])
def test_prompts_are_those_of_the_official_scripts(case):
    """Counted in characters: the haystack is as long as there, and nothing has to be tokenized."""
    generated = tasks()[case["task"]].tokens_to_generate
    found = samples(
        tasks()[case["task"]],
        tokens=case["longest"] + generated,
        count=case["samples"],
        seed=case["seed"],
        count_tokens=len,
    )
    wanted = {prompt["index"]: prompt for prompt in case["prompts"]}
    for index, sample in enumerate(itertools.islice(found, max(wanted) + 1)):
        if index in wanted:
            text = sample.context + sample.query
            assert len(text) == wanted[index]["characters"]
            assert hashlib.sha256(text.encode()).hexdigest() == wanted[index]["sha256"]
            assert sample.outputs == [wanted[index]["output"]]


@pytest.mark.parametrize("name", INFINITE)
def test_needles_are_at_all_depths(name):
    found = make(name, count=20, tokens=2048)
    depths = [sample.context.index(sample.outputs[0]) / len(sample.context) for sample in found]
    assert depths == sorted(depths)
    assert all(later - earlier < 0.12 for earlier, later in itertools.pairwise([0, *depths, 1]))


# The like of MRCR


@pytest.mark.parametrize("name", MRCR)
def test_the_question_is_which_of_several(name, made):
    asked_for = set()
    for sample in made(name):
        prefix, number, form, topic = re.search(
            r"Prepend (\w{10}) to the (\d)\w\w \(1 indexed\) (.+) about (\w+)\.", sample.query
        ).groups()
        example, conversation = sample.context.split("======END EXAMPLE======")
        asked = re.findall(rf"User: write a {form} about {topic}\nAssistant: (.*)", conversation)
        assert len(set(asked)) == MRCR[name]
        assert sample.outputs == [prefix + asked[int(number) - 1]]
        others = re.findall(r"User: write a (.+) about (\w+)\n", conversation)
        assert sum((one == form) != (other == topic) for one, other in others) > 3
        wrong = [METRICS["prefixed_ratio"](prefix + text, sample.outputs, sample.query) for text in asked]
        assert sorted(wrong)[-2] < 60
        asked_for.add(int(number))
        shown = re.search(r"User: Prepend (\w+) to the 2nd .*\nAssistant: \1(.*)", example)
        assert re.findall(r"poem about balloons\nAssistant: (.*)", example)[1] == shown[2]
    assert len(asked_for) > 1


def test_an_answer_needs_a_query_with_a_prefix():
    with pytest.raises(ValueError, match="Prepend PREFIX"):
        METRICS["prefixed_ratio"]("x", ["x"], "Which one?")


# openai/mrcr


def write_rows(folder, sizes):
    rows = []
    for number, size in enumerate(sizes):
        poem = f"Poem {number} of tapirs. " * size
        messages = [("user", "write a poem about tapirs"), ("assistant", poem), ("user", QUESTION)]
        rows.append(
            {
                "prompt": json.dumps([{"role": role, "content": content} for role, content in messages]),
                "answer": f"aYooSG8CQg{poem}",
                "n_needles": 2 if number % 2 == 0 else 8,
            }
        )
    (folder / "mrcr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


QUESTION = (
    "Prepend aYooSG8CQg to the 1st (1 indexed) poem about tapirs. Do not include any other text in your response."
)


def test_rows_of_a_length_are_taken_as_they_are(tmp_path):
    write_rows(tmp_path, [10, 500, 400, 300, 5000, 250, 500])
    short, long = make("mrcr_2", tmp_path, count=2)
    assert long.outputs[0].startswith("aYooSG8CQgPoem 6")
    assert short.query == f"User: {QUESTION}\n\nAssistant:"
    assert short.context == f"User: write a poem about tapirs\n\nAssistant: {'Poem 2 of tapirs. ' * 400}\n\n"
    assert METRICS["prefixed_ratio"](f" {short.outputs[0]}", short.outputs, short.query) == 100
    with pytest.raises(ValueError, match="mrcr_8: mrcr.jsonl has 3 rows of 2048 to 4096 tokens, 4 are asked for"):
        make("mrcr_8", tmp_path, count=4)
    with pytest.raises(ValueError, match="huggingface.co/datasets/openai/mrcr"):
        make("mrcr_4")
    (tmp_path / "mrcr.jsonl").write_text('{"prompt": "[]"}')
    with pytest.raises(ValueError, match="mrcr.jsonl has not the format"):
        make("mrcr_4", tmp_path)
