import json
import random
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AddedToken, AutoTokenizer

from nemo_star.text import tokenizer as tokenizer_module
from nemo_star.text.sentencepiece_alone import SentencePieceAlone
from nemo_star.text.tokenizer import Tokenizer, cut_at_spaces, end_token_ids

DEMO = Path(__file__).parent.parent.parent / "assets" / "demo_model"


class Hugging:
    """The parts of a Hugging Face tokenizer that Tokenizer uses; one token per character."""

    bos_token_id = 1
    eos_token_id = 2
    chat_template = None

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, think=""):
        assert add_generation_prompt
        return f"<user>{messages[0]['content'].strip()}</user><assistant>{think}"


def test_bos_stands_before_the_context_only():
    tokenizer = Tokenizer(Hugging())
    assert tokenizer.encode_context("ab") == [1, ord("a"), ord("b")]
    assert tokenizer.encode_query("c") == [ord("c")]


def test_without_a_bos_token_there_is_none():
    hugging = Hugging()
    hugging.bos_token_id = None
    assert Tokenizer(hugging).encode_context("a") == [ord("a")]


def test_chat_template_is_cut_before_the_query():
    hugging = Hugging()
    hugging.chat_template = "yes"
    context = Tokenizer(hugging).encode_context("long text ", chat_template=True)
    query = Tokenizer(hugging).encode_query("what?", chat_template=True)
    assert "".join(map(chr, context)) == "<user>long text \n\n"
    assert "".join(map(chr, query)) == "what?</user><assistant>"


def test_variables_reach_the_chat_template():
    hugging = Hugging()
    hugging.chat_template = "yes"
    query = Tokenizer(hugging).encode_query("what?", chat_template=True, template_kwargs={"think": "<no>"})
    assert "".join(map(chr, query)) == "what?</user><assistant><no>"


def test_no_chat_template_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(Hugging()).encode_query("b", chat_template=True)


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
        Tokenizer(hugging).encode_query("b", chat_template=True)


def test_a_sentencepiece_model_alone_is_enough(tmp_path):
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(DEMO / name, tmp_path / name)
    whole, alone = Tokenizer.load(DEMO), Tokenizer.load(tmp_path)
    text = "One of the special magic numbers for easy-canyon is: 2138216. Ünïcode  too."
    assert alone.encode_context(text) == whole.encode_context(text)
    assert alone.encode_query("What is it?") == whole.encode_query("What is it?")
    ids = whole.encode_context(text)
    assert alone.decode(ids) == whole.decode(ids)


def long_text():
    words = "the Größe of\n\n 12 needles  is <s> e\u0301tude, </s>x _ \t你好 世界 and\u3000so on. \n".split(" ")
    return " ".join(random.Random(0).choices(words, k=3000))


@pytest.mark.parametrize("files", [["tokenizer.model"], ["tokenizer.json", "tokenizer_config.json"]], ids=["sp", "hf"])
def test_a_long_text_is_encoded_in_parts_to_the_same_tokens(tmp_path, monkeypatch, files):
    for name in ["config.json", *files]:
        shutil.copy(DEMO / name, tmp_path / name)
    tokenizer = Tokenizer.load(tmp_path)
    text = long_text()
    whole = tokenizer._ids(text)
    lengths = []
    each = Tokenizer._each

    def noted(self, texts):
        lengths.extend(map(len, texts))
        return each(self, texts)

    monkeypatch.setattr(Tokenizer, "_each", noted)
    for characters in (1, 7, 100):
        monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", characters)
        lengths.clear()
        assert tokenizer._ids(text) == whole
        assert max(lengths) < characters + 200
        assert sum(lengths) > len(text) * 0.8


def test_parts_are_cut_between_words_only():
    assert cut_at_spaces("ab cd  ef. gh ij", 1) == ["ab", "cd  ef. gh", "ij"]
    assert cut_at_spaces("ab cd ef", 4) == ["ab cd", "ef"]
    assert cut_at_spaces("ab cd ef", 8) == ["ab cd ef"]


def trained(tmp_path, **options):
    """A SentencePiece model of `long_text`."""
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(long_text().splitlines()),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return Tokenizer(SentencePieceAlone(file))


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ({"model_type": "bpe", "vocab_size": 120}, True),
        ({"model_type": "bpe", "vocab_size": 200, "split_by_whitespace": False}, False),  # tokens of several words
        ({"model_type": "bpe", "vocab_size": 120, "treat_whitespace_as_suffix": True}, False),
        ({"model_type": "bpe", "vocab_size": 120, "add_dummy_prefix": False}, False),
        ({"model_type": "unigram", "vocab_size": 80}, False),  # the best of all cuts is one of the whole text
    ],
)
def test_a_tokenizer_that_looks_past_words_gets_the_whole_text(tmp_path, monkeypatch, options, may):
    monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", 10)
    tokenizer = trained(tmp_path, **options)
    assert tokenizer._words_stand_alone == may
    expected = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(long_text())
    assert tokenizer._ids(long_text()) == expected


def test_only_a_vocabulary_of_sentencepiece_is_cut():
    assert not Tokenizer(Hugging())._words_stand_alone


@pytest.mark.parametrize(("scheme", "may"), [("first", True), ("always", True), ("never", False)])
def test_other_ways_to_begin_a_text(tmp_path, monkeypatch, scheme, may):
    """transformers 5 makes tokenizer.json of Llama 2 with a pre-tokenizer instead of a normalizer."""
    changed = json.loads((DEMO / "tokenizer.json").read_text())
    changed["normalizer"] = None
    changed["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path / name)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer._words_stand_alone == may
    whole = tokenizer._ids(long_text())
    monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", 10)
    assert tokenizer._ids(long_text()) == whole


@pytest.mark.parametrize(
    ("added", "may"),
    [("<needle>", True), ("two words", False), ("needle", False), (AddedToken("of", rstrip=True, lstrip=True), False)],
)
def test_added_tokens_that_begin_or_end_like_a_word_forbid_it(monkeypatch, added, may):
    hugging = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    hugging.add_tokens([added])
    tokenizer = Tokenizer(hugging)
    assert tokenizer._words_stand_alone == may
    text = long_text().replace("12", "<needle> needle two words")
    whole = tokenizer._ids(text)
    monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", 10)
    assert tokenizer._ids(text) == whole
