import json
import os
import re
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from chat import save_tokenizer

from nemo_star.offline.files import InputFile, OutputFile, Resumed, read_resumed
from nemo_star.offline.requests import BadRequest, Request, RequestReader
from nemo_star.text.tokenizer import Tokenizer

READER = RequestReader(vocab_size=100, tokenizer=None)


def parse(**fields):
    return READER.parse_line(json.dumps(fields).encode(), 4)


def test_ids_and_further_fields():
    request = parse(id="a", context_ids=[1, 2], query_ids=[3], outputs=["x"], length=7)
    assert request == Request("a", 4, array("i", [1, 2]), [3], {"outputs": ["x"], "length": 7})


def test_names_of_the_published_reference():
    assert parse(index=5, context_ids=[1], query_ids=[3]).id == 5
    assert parse(index=5, id=6, context_ids=[1], query_ids=[3]).extra == {"index": 5}
    assert "no tokenizer" in parse(index=5, input_context="a", input_query="b").error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_ids": [1]}, "give either context (text) or context_ids"),
        ({"context_ids": [1], "context": "x", "query_ids": [1]}, "give either context (text) or context_ids"),
        ({"context_ids": [], "query_ids": [1]}, "the context is empty"),
        ({"context_ids": [1], "query_ids": []}, "the query is empty"),
        ({"context": "", "query": "a"}, "the context is empty"),
        ({"context_ids": [1, 100], "query_ids": [1]}, "token id 100, outside the vocabulary of 100 tokens"),
        ({"context_ids": [1, -1], "query_ids": [1]}, "token id -1, outside"),
        ({"context_ids": [1, "2"], "query_ids": [1]}, "context_ids must be a list of integers"),
        ({"context_ids": "12", "query_ids": [1]}, "context_ids must be a list of integers"),
        ({"context_ids": [1.0], "query_ids": [1]}, "context_ids must be a list of integers"),
        ({"context_ids": [True], "query_ids": [1]}, "context_ids must be a list of integers"),
        ({"context": 5, "query": "a"}, "context must be a string, not int"),
        ({"context": "\ud800", "query": "a"}, "not valid Unicode"),
        ({"context": "x", "query": "a"}, "the checkpoint has no tokenizer: give token ids"),
    ],
)
def test_a_bad_line_says_why_and_keeps_its_fields(fields, message):
    bad = parse(id="a", note=1, **fields)
    assert isinstance(bad, BadRequest)
    assert message in bad.error
    assert (bad.id, bad.index, bad.extra) == ("a", 4, {"note": 1})


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("chatml"), "chatml"))


MESSAGES = [{"role": "user", "content": "A long text.\n\nWhat is it?"}]


def chat_line(tokenizer, config=None, *, chat_template=False, vocab_size=500, **fields):
    """(request or what is wrong, the query's text) of a line with further fields."""
    reader = RequestReader(vocab_size, tokenizer, chat_template, config or {})
    found = reader.parse_line(json.dumps({"id": "a", "note": 1, **fields}).encode(), 0)
    return found, tokenizer.hf.decode(found.query_ids) if isinstance(found, Request) else found.error


def test_messages(chat_tokenizer):
    request, query = chat_line(chat_tokenizer, messages=MESSAGES)
    whole = chat_tokenizer.hf.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert [*request.context_ids, *request.query_ids] == whole
    assert query == "What is it?<|im_end|>\n<|im_start|>assistant\n"
    assert request.extra == {"note": 1}
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    assert chat_line(chat_tokenizer, messages=begun, continue_final_message=True)[1].endswith("assistant\nIt is")


def test_variables_of_the_chat_template_come_from_the_recipe_and_the_line(chat_tokenizer):
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    assert "<think>" in chat_line(chat_tokenizer, off, messages=MESSAGES)[1]
    assert "<think>" in chat_line(chat_tokenizer, on, messages=MESSAGES, chat_template_kwargs=off)[1]
    assert "<think>" not in chat_line(chat_tokenizer, off, messages=MESSAGES, chat_template_kwargs=on)[1]
    texts = {"context": "A long text.", "query": "What?"}
    assert "<think>" in chat_line(chat_tokenizer, off, chat_template=True, **texts)[1]
    assert "<think>" in chat_line(chat_tokenizer, chat_template=True, chat_template_kwargs=off, **texts)[1]
    assert "needs messages, or chat_template=true" in chat_line(chat_tokenizer, chat_template_kwargs=off, **texts)[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": MESSAGES, "context": "a", "query": "b"}, "messages goes without context, query"),
        ({"messages": MESSAGES, "query_ids": [1]}, "messages goes without query_ids"),
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": MESSAGES, "chat_template_kwargs": 5}, "chat_template_kwargs=5 must be a mapping"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"padding": 1}}, "chat_template_kwargs holds padding"),
        ({"messages": MESSAGES, "continue_final_message": 1}, "continue_final_message=1 must be true or false"),
        ({"messages": MESSAGES, "vocab_size": 50}, "outside the vocabulary of 50 tokens"),
        ({"context": "a", "query": "b", "continue_final_message": True}, "continue_final_message needs messages"),
        ({"messages": None}, "give either context (text) or context_ids (token ids), or messages"),
    ],
)
def test_bad_lines_with_messages(chat_tokenizer, fields, message):
    bad, error = chat_line(chat_tokenizer, **fields)
    assert message in error
    assert (bad.id, bad.extra) == ("a", {"note": 1})


def test_messages_need_a_tokenizer():
    assert "the checkpoint has no tokenizer" in parse(messages=MESSAGES).error


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\n", b"\xff\xfe", b"[" * 100000])
def test_a_line_that_is_no_object(line):
    bad = READER.parse_line(line, 0)
    assert isinstance(bad, BadRequest)
    assert bad.id is None


def test_input_can_be_gone_through_twice(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": 1}\n{\n{"index": "x"}')
    lines = InputFile(str(file))
    assert list(lines.ids()) == [1, None, "x"]
    assert len(list(lines)) == 3
    with pytest.raises(OSError, match="missing"):
        InputFile(str(tmp_path / "missing"))


def test_output_is_written_line_by_line(tmp_path):
    file = tmp_path / "out.jsonl"
    output = OutputFile(file)
    output.write({"id": 1, "text": "é"})
    assert file.read_text() == '{"id": 1, "text": "é"}\n'
    output.write({"id": "\ud800"})
    assert json.loads(file.read_bytes().split(b"\n")[1])["id"] == "\ud800"


def test_a_pipe_can_be_gone_through_twice_too():
    program = (
        "from nemo_star.offline.files import InputFile; "
        "lines = InputFile('/dev/stdin'); print(*lines.ids(), *lines.ids())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=b'{"id": 1}\n{"id": 2}', capture_output=True, check=True
    )
    assert done.stdout == b"1 2 1 2\n"


def test_resuming_keeps_whole_lines_and_drops_a_torn_one(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text('{"id": 1}\n{"id": 2}\n{"id": 3, "te')
    resumed = read_resumed(file, iter([1, 2, 3]))
    assert [answer["id"] for answer in resumed.answers] == [1, 2]
    assert file.read_text().endswith('"te')  # reading changes nothing
    OutputFile(file, kept_bytes=resumed.kept_bytes).write({"id": 3})
    assert file.read_text() == '{"id": 1}\n{"id": 2}\n{"id": 3}\n'


def test_resuming_what_is_not_there_starts_it(tmp_path):
    assert read_resumed(tmp_path / "out.jsonl", iter([1])) == Resumed([], 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}\n{"id": 3}\n', "line 2 has id 3, the input's has 2"),
        ('{"id": 1}\n{"id": 2}\n{"id": 3}\n', "holds more than the 2 lines of the input"),
        ("no json\n", "line 1 is no answer: not valid JSON"),
        ("5\n", "line 1 is no answer: not a JSON object"),
        ("my only notes", "holds no answers"),
    ],
)
def test_what_is_no_beginning_of_this_output_is_refused_and_kept(tmp_path, content, message):
    file = tmp_path / "out.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_resumed(file, iter([1, 2]))
    assert file.read_text() == content


def test_an_output_may_be_a_device():
    OutputFile(Path("/dev/null")).write({"id": 1})


def test_lines_hold_no_other_line_ends(tmp_path):
    file = tmp_path / "out.jsonl"
    OutputFile(file).write({"text": "a\u2028b"})
    assert len(file.read_text().splitlines()) == 1


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    file = tmp_path / "out.jsonl"
    output = OutputFile(file)
    output.write({"id": 1})
    real, calls = os.write, []

    def half_then_full(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space left on device: .*out.jsonl"):
        output.write({"id": 2})
    assert file.read_text() == '{"id": 1}\n'
