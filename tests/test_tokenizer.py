import json
import shutil
from pathlib import Path

import pytest

from nemo_star.tokenizer import TextStream, Tokenizer, end_token_ids


class Bytes:
    """A tokenizer of bytes: token = byte."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def stream(text, end_strings=()):
    """(pieces shown while tokens come, piece shown at the end, stream)."""
    stream = TextStream(Bytes(), end_strings)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.ended:
            break
    return pieces, stream.finish(), stream


def test_pieces_add_up_to_the_text():
    pieces, last, result = stream("plain text")
    assert "".join(pieces) + last == result.text == "plain text"
    assert pieces[0] == "p"


def test_an_unfinished_character_is_held_back():
    pieces, last, result = stream("aé€")
    assert pieces == ["a", "", "é", "", "", "€"]
    cut = TextStream(Bytes())
    assert [cut.push(byte) for byte in "é".encode()[:1]] == [""]
    assert cut.finish() == "\N{REPLACEMENT CHARACTER}"


def test_an_end_string_ends_and_is_not_shown():
    pieces, last, result = stream("one STOP two", ("STOP",))
    assert result.ended
    assert "".join(pieces) + last == result.text == "one "


def test_the_start_of_an_end_string_is_held_back_and_given_when_it_was_none():
    pieces, last, result = stream("a STOx", ("STOP",))
    assert pieces == ["a", " ", "", "", "", "STOx"]
    pieces, last, result = stream("a ST", ("STOP",))
    assert "".join(pieces) == "a "
    assert last == "ST"
    assert not result.ended


def test_the_earliest_end_string_counts():
    assert stream("a.b!c", ("!", ".b!"))[2].text == "a"


class Hugging:
    """The parts of a Hugging Face tokenizer that Tokenizer uses; one token per character."""

    bos_token_id = 1
    eos_token_id = 2
    chat_template = None

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt
        return f"<user>{messages[0]['content'].strip()}</user><assistant>"


def test_bos_stands_before_the_context_only():
    context, query = Tokenizer(Hugging()).encode("ab", "c")
    assert context == [1, ord("a"), ord("b")]
    assert query == [ord("c")]


def test_without_a_bos_token_there_is_none():
    hugging = Hugging()
    hugging.bos_token_id = None
    assert Tokenizer(hugging).encode("a", "c")[0] == [ord("a")]


@pytest.mark.parametrize(("context", "query", "name"), [("", "b", "context"), ("a", "", "query")])
def test_empty_text_is_refused(context, query, name):
    with pytest.raises(ValueError, match=f"the {name} is empty"):
        Tokenizer(Hugging()).encode(context, query)


def test_chat_template_is_cut_before_the_query():
    hugging = Hugging()
    hugging.chat_template = "yes"
    context, query = Tokenizer(hugging).encode("long text ", "what?", chat_template=True)
    assert "".join(map(chr, context)) == "<user>long text \n\n"
    assert "".join(map(chr, query)) == "what?</user><assistant>"


def test_no_chat_template_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(Hugging()).encode("a", "b", chat_template=True)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6}), ({}, {"eos_token_id": 7}, {7}), (None, {}, set())],
)
def test_end_tokens_come_from_the_generation_config_first(tmp_path, generation, config, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_token_ids(tmp_path, None) == expected
    assert end_token_ids(tmp_path, Tokenizer(Hugging())) == expected | {2}


def test_a_directory_without_tokenizer_files_has_none(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_template_that_changes_the_text_is_refused():
    hugging = Hugging()
    hugging.chat_template = "yes"
    hugging.apply_chat_template = lambda *_, **__: "no content"
    with pytest.raises(ValueError, match="does not give a user's message once and unchanged"):
        Tokenizer(hugging).encode("a", "b", chat_template=True)


def test_a_sentencepiece_model_alone_is_enough(tmp_path):
    assets = Path(__file__).parent.parent / "assets" / "demo_model"
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(assets / name, tmp_path / name)
    whole, alone = Tokenizer.load(assets), Tokenizer.load(tmp_path)
    text = "One of the special magic numbers for easy-canyon is: 2138216. Ünïcode  too."
    assert alone.encode(text, "What is it?") == whole.encode(text, "What is it?")
    ids = whole.encode(text, "x")[0]
    assert alone.decode(ids) == whole.decode(ids)
