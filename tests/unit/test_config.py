from dataclasses import dataclass

import pytest

from nemo_star.checkpoint.description import CheckpointDescription
from nemo_star.config.compose import compose
from nemo_star.config.generate import GenerateConfig, InferenceConfig
from nemo_star.config.model import RopeScaling
from nemo_star.config.parallel import ParallelConfig
from nemo_star.config.strict import parse
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of

QUESTION = {"checkpoint": "c", "context": "a", "query": "b"}


def test_values_reach_their_fields():
    config = parse(
        GenerateConfig,
        {
            **QUESTION,
            "attention": {"kind": "dense", "block_size": 32},
            "inference": {"temperature": 2, "end_strings": ["a", "b"]},
            "cache": {"dtype": "bfloat16"},
        },
    )
    assert config.attention == AttentionConfig(kind="dense", block_size=32)
    assert config.inference == InferenceConfig(temperature=2.0, end_strings=("a", "b"))
    assert config.cache.dtype == "bfloat16"
    assert config.parallel == ParallelConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": {"blok_size": 3}}, "unknown key attention.blok_size; known keys here: attention.kind"),
        ({"attention": {"block_size": "4K"}}, "attention.block_size='4K' must be of type int"),
        ({"attention": {"block_size": True}}, "attention.block_size=True must be of type int"),
        ({"attention": {"kind": "full"}}, "attention.kind='full' is unknown; known: dense, ring, star, summary,"),
        ({"attention": {"kernel": "cuda"}}, "attention.kernel='cuda' must be 'auto', 'te',"),
        ({"attention": {"block_size": 0}}, "attention.block_size=0 must be at least 1 token"),
        ({"attention": {"block_size": 32, "anchor_size": 64}}, "anchor_size=64 is larger than attention.block_size=32"),
        ({"attention": {"anchor_content": "last"}}, "attention.anchor_content='last' must be 'first', 'previous', "),
        ({"attention": {"sink_size": -1}}, "attention.sink_size=-1 must be 0 (no sink) or more"),
        ({"attention": {"chunk_size": 0}}, "attention.chunk_size=0 must be 1 to 4096 tokens"),
        ({"attention": 3}, "attention=3 must be a group of keys"),
        ({"inference": {"temperature": 0}}, "inference.temperature=0.0 must be 0.001 or more"),
        ({"inference": {"temperature": float("nan")}}, "inference.temperature=nan must be"),
        ({"inference": {"seed": -1}}, "inference.seed=-1 must be at least 0"),
        ({"parallel": {"timeout_minutes": float("inf")}}, "parallel.timeout_minutes=inf must be above 0"),
        ({"inference": {"top_p": 1.5}}, "inference.top_p=1.5"),
        ({"inference": {"tokens_to_generate": 0}}, "inference.tokens_to_generate=0 must be at least 1"),
        ({"attention": {"block_size": 4.0}}, "attention.block_size=4.0 must be of type int"),
        ({"attention": None}, "attention=None must be a group of keys"),
        ({"chat_template": 1}, "chat_template=1 must be of type bool"),
        ({"inference": {"temperature": True}}, "inference.temperature=True must be of type float"),
        ({"inference": {"temperature": "1"}}, "inference.temperature='1' must be of type float"),
        ({"inference": {"end_strings": ["a", 1]}}, "inference.end_strings.1=1 must be of type str"),
        ({"context": "\udcff"}, "context: must be UTF-8 text"),
        ({"inference": {"end_strings": "x"}}, "inference.end_strings='x' must be a list"),
        ({"parallel": {"context_parallel_size": 0}}, "parallel.context_parallel_size=0 must be at least 1"),
        ({"dtype": "fp8"}, "dtype='fp8' must be 'float32', 'bfloat16' or 'float16'"),
        ({"checkpoint": None}, "checkpoint is not set"),
        ({"context": None}, "no context: give context=TEXT or context_file=PATH"),
        ({"query_file": "q"}, "query and query_file are both set"),
        ({"input": "x.jsonl"}, "input=x.jsonl goes without context, query"),
        ({"resume": True}, "resume=true continues an output file"),
        ({"debug": {"dump": "d"}, "decode": {"cuda_graph": True}}, "a CUDA graph does not show"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        parse(GenerateConfig, {**QUESTION, **values})
    assert message in str(error.value)


def test_all_that_is_wrong_is_said_on_one_line():
    wrong = {"nonsense": 1, "attention": {"blok": 1, "anchr": 2, "anchor": "none"}, "inference": {"seed": "0"}}
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        parse(GenerateConfig, {**QUESTION, **wrong})
    message = str(error.value)
    for problem in ("unknown key nonsense", "unknown key attention.blok", "unknown key attention.anchr"):
        assert problem in message
    assert message.count("known keys here: attention.kind, ") == 1
    assert "attention.anchor='none' must be 'shared' or 'recompute'" in message
    assert "inference.seed='0' must be of type int" in message


def test_a_prefix_leads_every_key():
    with pytest.raises(ValueError, match=r"^row 3: block_size='a' must be of type int$"):
        parse(AttentionConfig, {"block_size": "a"}, prefix="row 3: ")
    with pytest.raises(ValueError, match=r"^unknown key row 3: size; known keys here: row 3: kind, row 3: "):
        parse(AttentionConfig, {"size": 3}, prefix="row 3: ")


def test_a_key_of_a_group_in_a_list_is_named_with_its_place():
    @dataclass
    class Step:
        name: str

    @dataclass
    class Steps:
        steps: tuple[Step, ...] = ()

    with pytest.raises(ValueError, match=r"^unknown key steps\.1\.nmae; known keys here: steps\.1\.name$"):
        parse(Steps, {"steps": [{"name": "a"}, {"name": "b", "nmae": "c"}]})


def test_optional_groups_mappings_and_missing_keys():
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 8}
    scaling = {"rope_type": "linear", "factor": 2}
    described = {"format_version": 1, "architecture": "A", "dtype": "float32", "weight_files": {"a": 5}}
    whole = {**described, "model": {**shape, "vocab_size": 9, "rope_scaling": scaling}}
    found = parse(CheckpointDescription, whole)
    assert found.model.rope_scaling == RopeScaling("linear", 2.0)
    assert found.model.kv_channels == 4
    assert found.weight_files == {"a": 5}
    for values, message in [
        ({**described, "model": shape}, r"^missing key model.vocab_size$"),
        ({**whole, "weight_files": {"a": "5"}}, r"^weight_files.a='5' must be of type int$"),
        ({**whole, "weight_files": 3}, r"^weight_files=3 must be a mapping$"),
        (
            {**whole, "model": {**whole["model"], "rope_scaling": {**scaling, "low": 1}}},
            r"^unknown key model.rope_scaling.low; known keys here: model.rope_scaling.rope_type, ",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(CheckpointDescription, values)


def test_resume_contradicts_overwrite_and_logits():
    lines = {"checkpoint": "c", "input": "i", "output": "o", "resume": True}
    with pytest.raises(ValueError, match="contradict"):
        parse(GenerateConfig, {**lines, "overwrite": True})
    with pytest.raises(ValueError, match="output_logits"):
        parse(GenerateConfig, {**lines, "output_logits": "l"})


@pytest.mark.parametrize(
    ("config", "context_tokens", "sizes"),
    [
        (AttentionConfig(), 100, (25, 25)),
        (AttentionConfig(), 101, (26, 26)),
        (AttentionConfig(), 1_000_000, (32768, 32768)),
        (AttentionConfig(block_size=64), 100, (64, 64)),
        (AttentionConfig(block_size=64, anchor_size=0), 100, (64, 0)),
        (AttentionConfig(kind="dense", block_size=64), 100, (100, 0)),
    ],
)
def test_default_sizes(config, context_tokens, sizes):
    assert method_of(config).sizes(context_tokens) == sizes


def test_an_anchor_larger_than_the_default_block_names_both():
    with pytest.raises(ValueError, match=r"anchor_size=30 is larger than the block size 25"):
        method_of(AttentionConfig(anchor_size=30)).sizes(100)


def test_variables_of_a_chat_template():
    config = parse(GenerateConfig, {**QUESTION, "chat_template_kwargs": {"enable_thinking": False, "n": [1, "a"]}})
    assert config.chat_template_kwargs == {"enable_thinking": False, "n": [1, "a"]}
    for values, message in [
        ({"tokenize": True, "chat_template": "x"}, "chat_template_kwargs holds chat_template, tokenize: it takes"),
        ("x", "chat_template_kwargs='x' must be a mapping"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(GenerateConfig, {**QUESTION, "chat_template_kwargs": values})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "checkpoint=c", "dtype=float32"],
        ["checkpoint=c", "dtype=float32", "--cfg", "job"],
        ["--config-dir", "FOLDER", "--cfg", "job", "checkpoint=c", "dtype=float32"],
        ["--cfg", "job", "--config-dir", "FOLDER", "checkpoint=c", "dtype=float32"],
    ],
)
def test_flags_may_come_before_and_after_the_keys(arguments, tmp_path, capsys):
    folder = tmp_path / "a=b"
    folder.mkdir()
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert compose(GenerateConfig, arguments, tool="generate") is None
    shown = capsys.readouterr().out
    assert "checkpoint: c\n" in shown
    assert "dtype: float32\n" in shown
