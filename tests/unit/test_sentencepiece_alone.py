"""tokenizer.model alone, with what stands beside it, against the tokenizer that transformers has of the same model."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from chat import template
from transformers import AddedToken as TransformersToken
from transformers import AutoTokenizer

from nemo_star.text.chat import split_messages
from nemo_star.text.sentencepiece_alone import AddedToken
from nemo_star.text.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent.parent / "assets" / "demo_model"
VOCABULARY = 1536
ADDED = [
    AddedToken("<|im_start|>", special=True),
    AddedToken("<|im_end|>", special=True),
    AddedToken("<|im_end|>>"),
    AddedToken("<needle>"),
    AddedToken("<blanks>", lstrip=True, rstrip=True),
    AddedToken("harpoon", single_word=True),
]
TEXTS = [
    "a <needle> b",
    "a<needle>b <|im_end|>> and <|im_end|>",
    "<|im_start|>user\nHello  <|im_end|>\n",
    "<s>[INST] x </s>",
    "x  <blanks>\n y",
    "<blanks>x",
    "a harpoon, harpoons, <harpoon> harpoon",
    "<|im_start|><|im_end|>",
    "Ü<|im_start|> é 你好",
    "plain text",
    "",
]


def folder_of(folder, **config):
    """The demo's tokenizer.model and a tokenizer_config.json with further values."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(DEMO / name, folder / name)
    values = json.loads((DEMO / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, **config}))
    return folder


def decoder_of(tokens):
    return {str(VOCABULARY + number): {**asdict(token), "normalized": False} for number, token in enumerate(tokens)}


@pytest.fixture(params=[True, False], ids=["legacy", "not-legacy"])
def pair(request, tmp_path):
    """(ours, transformers' one) with added tokens; both ways of text after one of them."""
    ours = Tokenizer.load(folder_of(tmp_path / "sp", legacy=request.param, added_tokens_decoder=decoder_of(ADDED)))
    values = json.loads((DEMO / "tokenizer.json").read_text())
    if not request.param:
        values["normalizer"] = None
        values["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(values))
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path / "hf" / name)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    theirs.add_tokens([TransformersToken(**asdict(token), normalized=False) for token in ADDED])
    return ours, theirs


def test_added_tokens_in_the_middle_of_a_text(pair):
    ours, theirs = pair
    expected = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert ours.hf(TEXTS)["input_ids"] == expected
    assert all(any(VOCABULARY + number in ids for ids in expected) for number in range(len(ADDED)))
    for ids in expected:
        for skip in (True, False):
            assert ours.hf.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_the_same(pair):
    ours, theirs = pair
    assert ours.special_tokens == Tokenizer(theirs).special_tokens
    assert ours.special_tokens[VOCABULARY] == "<|im_start|>"
    assert (ours.hf.bos_token_id, ours.hf.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_without_files_beside_it_nothing_is_added(tmp_path):
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_query("<s>") != [1]
    assert (tokenizer.hf.bos_token_id, tokenizer.hf.eos_token_id) == (1, 2)
    assert tokenizer.special_tokens == {1: "<s>", 2: "</s>"}


def test_added_tokens_of_the_older_files(tmp_path):
    folder = folder_of(tmp_path, eos_token=None)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": VOCABULARY, "<needle>": VOCABULARY + 1}))
    named = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<unknown>", "additional_special_tokens": ["ly"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.hf.eos_token_id == VOCABULARY
    ids = tokenizer.encode_query("a<needle><|im_end|>")
    assert ids[-2:] == [VOCABULARY + 1, VOCABULARY]
    assert tokenizer.decode(ids) == "a<needle>"


def test_a_token_that_is_named_as_none_is_none(tmp_path):
    assert Tokenizer.load(folder_of(tmp_path, bos_token=None)).hf.bos_token_id is None


def test_ids_beyond_the_vocabulary_have_no_text(tmp_path):
    tokenizer = Tokenizer.load(folder_of(tmp_path))
    assert tokenizer.decode([*tokenizer.encode_query("text"), VOCABULARY + 7]) == "text"


@pytest.mark.parametrize("where", ["config", "named", "file"])
def test_its_chat_template(tmp_path, where):
    source = template("chatml")
    config = {"config": source, "named": [{"name": "default", "template": source}, {"name": "x", "template": "y"}]}
    folder = folder_of(
        tmp_path, added_tokens_decoder=decoder_of(ADDED), chat_template=config.get(where, "not this one")
    )
    if where == "file":
        (folder / "chat_template.jinja").write_text(source)
    tokenizer = Tokenizer.load(folder)
    context, query = split_messages(tokenizer, [{"role": "user", "content": "A long text.\n\nWhat is it?"}])
    start, end = VOCABULARY, VOCABULARY + 1
    whole = "<|im_start|>user\nA long text.\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert context + query == tokenizer.hf([whole])["input_ids"][0]
    assert (context[0], context.count(start), query.count(end)) == (start, 1, 1)
    assert tokenizer.hf.decode(query).startswith("What is it?<|im_end|>")


def test_the_template_gets_the_names_of_special_tokens(tmp_path):
    folder = folder_of(tmp_path, chat_template=template("mistral"))
    context, query = split_messages(Tokenizer.load(folder), [{"role": "user", "content": "Long.\n\nWhat is it?"}])
    assert context[0] == 1
    assert 1 not in context[1:] + query
