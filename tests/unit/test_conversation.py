"""Conversations about a book, the tokens of their turns, and the tool."""

import random

import pytest
import torch
from chat import FAMILIES, save_tokenizer
from launch import ROOT, run_tool

from nemo_star import LLM, SamplingParams
from nemo_star.evaluation.needles import make_document, question
from nemo_star.text.tokenizer import Tokenizer

CONTEXT = [(7 * i * i + 3 * i) % 251 for i in range(120)]
PARAMS = SamplingParams(max_tokens=5, logits=True)


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, attention={"block_size": 32})


@pytest.fixture
def book(llm):
    return llm.encode(CONTEXT)


def test_a_turn_sees_the_ones_before_it(llm, book):
    conversation = llm.converse(book)
    first, second = conversation.ask([3, 4, 5], PARAMS), conversation.ask([9, 8], PARAMS)
    so_far = [3, 4, 5, *first.token_ids, 9, 8]
    (once,) = llm.generate(book, [so_far], PARAMS)
    assert second.token_ids == once.token_ids
    assert (second.logits - once.logits).abs().max() <= 5e-4
    (alone,) = llm.generate(book, [[9, 8]], PARAMS)
    assert (second.logits - alone.logits).abs().max() > 5e-4


def test_turns_are_taken_back_and_parted(llm, book):
    conversation = llm.converse(book)
    first = conversation.ask([3, 4, 5], PARAMS)
    forked = conversation.fork()
    second = conversation.ask([9, 8], PARAMS)
    other = forked.ask([7], PARAMS)
    conversation.truncate(1)
    assert len(conversation.turns) == 1
    torch.testing.assert_close(conversation.ask([9, 8], PARAMS).logits, second.logits, atol=5e-4, rtol=0)
    conversation.truncate(1)
    torch.testing.assert_close(conversation.ask([7], PARAMS).logits, other.logits, atol=5e-4, rtol=0)
    conversation.truncate(0)
    assert conversation.ask([3, 4, 5], PARAMS).token_ids == first.token_ids
    with pytest.raises(ValueError, match=r"truncate\(2\): the conversation has 1 turns"):
        conversation.truncate(2)
    with pytest.raises(ValueError, match=r"goes on with one answer, not n=2: fork\(\)"):
        conversation.ask([3], SamplingParams(n=2))


def test_a_conversation_ends_when_its_book_goes_on(llm, book):
    conversation = llm.converse(book)
    conversation.ask([3], PARAMS)
    before = llm.generate(book, [[5, 6]], PARAMS)[0]
    book.append([1, 2, 3] * 20)
    assert book.tokens == 180
    whole = LLM.generate(llm, llm.encode([*CONTEXT, *[1, 2, 3] * 20]), [[5, 6]], PARAMS)[0]
    after = llm.generate(book, [[5, 6]], PARAMS)[0]
    torch.testing.assert_close(after.logits, whole.logits, atol=5e-4, rtol=0)
    assert (after.logits - before.logits).abs().max() > 5e-4
    with pytest.raises(ValueError, match="the context has gone on since this sequence began"):
        conversation.ask([4], PARAMS)


def test_books_are_saved_and_loaded(llm, book, tmp_path):
    expected = llm.generate(book, [[5, 6]], PARAMS)[0]
    book.save(tmp_path / "book")
    loaded = llm.load(tmp_path / "book", verify=True)
    assert llm.generate(loaded, [[5, 6]], PARAMS)[0].token_ids == expected.token_ids
    with pytest.raises(ValueError, match="nowhere"):
        llm.load(tmp_path / "nowhere")


def test_samples_part_after_the_query(llm, book):
    params = SamplingParams(max_tokens=4, temperature=5.0, seed=3, n=3)
    (together,) = llm.generate(book, [[3, 4]], params)
    alone = [
        llm.generate(book, [[3, 4]], SamplingParams(max_tokens=4, temperature=5.0, seed=3 + i))[0] for i in range(3)
    ]
    assert [sample.token_ids for sample in together.samples] == [result.token_ids for result in alone]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_turns_are_the_templates(family, tmp_path):
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, family))
    turns = [("Who saw the whale?", "The captain."), ("What did it do?", "")]
    ids = tokenizer.encode_turns(turns)
    messages = [
        {"role": "user", "content": f"The whale swam.\n\n{turns[0][0]}"},
        {"role": "assistant", "content": turns[0][1]},
        {"role": "user", "content": turns[1][0]},
    ]
    whole = tokenizer.render(messages, add_generation_prompt=True)
    after = whole.partition("The whale swam.\n\n")[2]
    assert ids == tokenizer.hf(after, add_special_tokens=False)["input_ids"]


def test_the_tool_answers_line_by_line(demo, tmp_path):
    document = make_document(random.Random("chat"), filler_sentences=40, needles=2)
    (tmp_path / "book.txt").write_text(document.text)
    (first, one), (second, two) = document.needles.items()
    (tmp_path / "more.txt").write_text(document.text)
    commands = ["/nonsense", "/append", "/append more.txt", "/quit", "never read"]
    typed = [question(first), "/back", question(second), *commands]
    done = run_tool(
        ROOT / "tools/chat.py",
        f"checkpoint={demo}",
        "context_file=book.txt",
        "attention.block_size=64",
        "inference.tokens_to_generate=12",
        stdin="\n".join(typed),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == [one, two]
    assert "tokens encoded in" in done.stderr
    assert "error: unknown command /nonsense" in done.stderr
    assert "error: /append takes a file" in done.stderr
    assert "the conversation begins anew" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query=Who?", "context=x"], "interactive=true takes questions as they are typed: without query"),
        (["context_file=-"], "reads questions from standard input: context_file=-"),
        ([], "no context: give context=TEXT"),
    ],
)
def test_what_a_conversation_does_not_take_is_refused(demo, arguments, message):
    from nemo_star.commands import chat

    with pytest.raises(ValueError, match=message):
        chat.main([f"checkpoint={demo}", *arguments])
