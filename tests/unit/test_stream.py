import re
from typing import ClassVar

from nemo_star.text.stream import TextStream


class Bytes:
    """A tokenizer of bytes: token = byte; two special tokens beside them."""

    special_tokens: ClassVar = {256: "<end>", 257: "<call>"}

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def stream(text, end_strings=()):
    """(pieces shown while tokens come, piece shown at the end, stream); text may name special tokens."""
    stream = TextStream(Bytes(), end_strings)
    pieces = []
    named = {text: token for token, text in Bytes.special_tokens.items()}
    for part in re.split("(<end>|<call>)", text):
        for token in [named[part]] if part in named else part.encode():
            pieces.append(stream.push(token))
            if stream.ended:
                return pieces, stream.finish(), stream
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


def test_a_special_token_ends_the_answer_where_an_end_string_is_its_text():
    pieces, last, result = stream("one<end> two", ("<end>",))
    assert result.ended
    assert len(pieces) == 4
    assert "".join(pieces) + last == result.text == "one"
    assert not stream("one<end> two")[2].ended
    assert stream("one<end> two")[2].text == "one two"


def test_an_end_string_of_text_and_a_special_token():
    pieces, last, result = stream("a bye b<call>bye<end>x", ("bye<end>",))
    assert result.ended
    assert "".join(pieces) + last == result.text == "a bye b"
    assert pieces[:4] == ["a", " ", "", ""]  # what may become the end is held back
    pieces, last, result = stream("one bye<call><end>", ("bye<end>",))
    assert not result.ended
    assert "".join(pieces) + last == result.text == "one bye"


def test_an_end_string_that_goes_on_after_a_special_token():
    pieces, last, result = stream("x<call>\nyes it", ("<call>\nyes",))
    assert result.ended
    assert "".join(pieces) + last == result.text == "x"


def test_text_inside_a_special_token_ends_nothing():
    pieces, last, result = stream("a<end>b end", ("end",))
    assert result.text == "ab "
    assert stream("a<end>b", ("end", "<call>"))[2].text == "ab"


def test_a_special_token_spelled_out_in_ordinary_ones_ends_too():
    stream = TextStream(Bytes(), ("<end>",))
    shown = "".join(stream.push(byte) for byte in b"one<end>")
    assert stream.ended
    assert shown == stream.text == "one"


def test_the_earliest_end_counts_whatever_its_kind():
    assert stream("a!<end>", ("<end>", "!"))[2].text == "a"
    assert stream("a<end>!", ("!", "<end>"))[2].text == "a"
