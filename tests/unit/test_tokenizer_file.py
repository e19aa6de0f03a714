"""A tokenizer.json read without transformers, against transformers."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from nemo_star.text.tokenizer import Tokenizer
from nemo_star.text.tokenizer_file import TokenizerFile

DEMO = Path(__file__).parent.parent.parent / "assets" / "demo_model"
TEXTS = ["The number  is 4242.\nWhat is it?", "", " ", "\N{SNOWMAN} </s>x<s>", "<call> a <call>b", "a<unk>", "x" * 300]


def altered(folder, **values):
    """The demo's tokenizer with other values in its tokenizer_config.json; None removes one."""
    shutil.copytree(DEMO, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def with_tokens(folder):
    """Saved by transformers, with tokens added to it, one of them special."""
    theirs = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    theirs.add_tokens([AddedToken("<call>", lstrip=True, normalized=False), AddedToken("ship", special=True)])
    theirs.pad_token = "ship"
    theirs.save_pretrained(folder)
    return altered(folder, tokenizer_class="PreTrainedTokenizerFast", backend=None)


def tokenizes(tokenizer):
    return tokenizer._tokenizes


def same(ours, folder):
    theirs = Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    for text in [*TEXTS, "It was a ship. " * 8000]:
        ids = theirs.encode_context(text)
        assert ours.encode_context(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode_cut(text, len(text) // 2) == theirs.encode_cut(text, len(text) // 2)
    assert ours.special_tokens == theirs.special_tokens
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.decode([10**6, 5]) == theirs.decode([10**6, 5])


def test_it_tokenizes_and_decodes_as_transformers_does():
    ours = Tokenizer.load(DEMO)
    assert isinstance(tokenizes(ours), TokenizerFile)
    same(ours, DEMO)


def test_it_does_with_added_tokens(tmp_path):
    folder = with_tokens(tmp_path)
    ours = Tokenizer.load(folder)
    assert isinstance(tokenizes(ours), TokenizerFile)
    same(ours, folder)


def test_a_truncation_in_the_file_is_not_heeded(tmp_path):
    """transformers sets it anew for each call."""
    folder = altered(tmp_path)
    file = folder / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}))
    assert isinstance(tokenizes(Tokenizer.load(folder)), TokenizerFile)
    assert Tokenizer.load(folder).encode_query(TEXTS[0]) == Tokenizer.load(DEMO).encode_query(TEXTS[0])


def test_the_tokenizer_itself_is_there_when_asked_for():
    ours = Tokenizer.load(DEMO)
    assert isinstance(ours.hf, PreTrainedTokenizerFast)
    assert ours.hf is ours.hf


@pytest.mark.parametrize(
    "values",
    [
        {"clean_up_tokenization_spaces": True},
        {"clean_up_tokenization_spaces": None},
        {"add_prefix_space": True},
        {"split_special_tokens": True},
        {"bos_token": "<begin>"},
        {"pad_token": "ship"},
        {"additional_special_tokens": ["<call>"]},
        {"added_tokens_decoder": {"2048": {"content": "<call>", "special": True}}},
        {"added_tokens_decoder": {"1": {"content": "<s>", "special": True, "lstrip": True}}},
        {"tokenizer_class": "LlamaTokenizer"},
    ],
)
def test_what_it_does_not_know_is_left_to_transformers(tmp_path, values):
    folder = altered(tmp_path, **values)
    ours = Tokenizer.load(folder)
    assert not isinstance(tokenizes(ours), TokenizerFile)
    same(ours, folder)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json"])
def test_files_beside_it_are_left_to_transformers(tmp_path, name):
    folder = altered(tmp_path)
    (folder / name).write_text("{}")
    assert not isinstance(tokenizes(Tokenizer.load(folder)), TokenizerFile)
