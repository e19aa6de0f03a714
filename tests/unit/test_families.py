"""Every family against transformers: logits and tokens, conversion both ways, what is refused."""

import json
from collections import Counter

import pytest
import torch
from family_models import CASES, greedy, save_model, tokens
from recorded import RecordedStep
from safetensors.torch import load_file, save_file

from nemo_star import LLM, SamplingParams
from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint
from nemo_star.checkpoint.hf import HFReader
from nemo_star.checkpoint.stream import DistCheckpointReader
from nemo_star.engine.graphs import StepGraphs, check_graphs
from nemo_star.kernels import few_rows
from nemo_star.models.experts import Experts
from nemo_star.models.families import families
from nemo_star.parallel.experts import ExpertLayout, check_experts
from nemo_star.parallel.layout import Layout
from nemo_star.planning.memory import weight_elements

CONTEXT, QUERY, STEPS = 90, 7, 32


ALIKE = ("llama-attention-bias", "llama-mlp-bias", "phi3-whole")
"""Cases whose parts others have, too."""


@pytest.fixture(
    scope="module", params=[pytest.param(case, marks=pytest.mark.slow if case in ALIKE else ()) for case in CASES]
)
def converted(request, tmp_path_factory):
    """(transformers' model, its folder, the converted checkpoint)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder / "hf", request.param)
    import_checkpoint(folder / "hf", folder / "converted")
    return model, folder / "hf", folder / "converted"


def test_logits_and_tokens_are_those_of_transformers(converted, monkeypatch):
    model, _, checkpoint = converted
    context, query = tokens(CONTEXT, seed=5), tokens(QUERY, seed=6)
    expected, logits = greedy(model, context + query, STEPS)
    taken, product = [], few_rows._product
    monkeypatch.setattr(few_rows, "_product", lambda x, weight: taken.append(weight) or product(x, weight))
    for attention, smallest in (({"kind": "dense"}, 2**20), ({"kind": "star", "block_size": CONTEXT}, 1)):
        monkeypatch.setattr(few_rows, "MIN_NUMBERS", smallest)  # the query's products by the code for a few rows
        llm = LLM(checkpoint, attention=attention)
        result = llm.generate(
            llm.encode(context), [query], SamplingParams(max_tokens=STEPS, ignore_eos=True, logits=True)
        )[0]
        assert list(result.token_ids) == expected
        assert (result.logits - logits).abs().max() <= 5e-4
        assert bool(taken) == (smallest == 1 and few_rows.is_installed())


@pytest.mark.slow
def test_replayed_decode_steps_are_those_of_transformers(converted, monkeypatch):
    """Rotary angles, factors of queries, norms, biases: all of it follows from what is on the device."""
    model, _, checkpoint = converted
    llm = LLM(checkpoint, attention={"kind": "dense", "kernel": "cpu"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    if hasattr(torch.nn.functional, "grouped_mm"):  # without, models with experts are refused
        monkeypatch.setattr(Experts, "runs_grouped", lambda *_: True)
    try:
        check_graphs(llm.description.model, llm.groups.layout, torch.device("cuda"), torch.bfloat16)
    except ValueError as refused:
        pytest.skip(str(refused))
    context, query = tokens(CONTEXT, seed=5), tokens(QUERY, seed=6)
    expected, logits = greedy(model, context + query, STEPS)
    made = []
    llm.engine.graphs = StepGraphs(llm.engine, lambda: made.append(RecordedStep()) or made[-1])
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True, logits=True)
    (result,) = llm.generate(llm.encode(context), [query], params)
    assert list(result.token_ids) == expected
    assert (result.logits - logits).abs().max() <= 5e-4
    assert [step.replays for step in made] == [STEPS - 2]


def test_export_gives_back_the_same_tensors(converted, tmp_path):
    model, folder, checkpoint = converted
    export_checkpoint(checkpoint, tmp_path / "back")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = type(model).from_pretrained(tmp_path / "back", dtype="auto").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_experts_that_lie_together_are_read_once_and_stored_one_by_one(tmp_path, monkeypatch):
    save_model(tmp_path / "hf", "gpt-oss")
    read, get = Counter(), HFReader.get
    monkeypatch.setattr(HFReader, "get", lambda self, name: read.update([name]) or get(self, name))
    import_checkpoint(tmp_path / "hf", tmp_path / "converted", dtype=torch.bfloat16)
    assert set(read.values()) == {1}
    stored = DistCheckpointReader(tmp_path / "converted" / "weights").tensors
    for part, shape in {"linear_fc1": (160, 48), "linear_fc2": (48, 80)}.items():
        weight = stored[f"decoder.layers.mlp.experts.experts.{part}.weight"]
        assert (weight.shape, weight.dtype) == ((4, 8, *shape), torch.bfloat16)
        assert {chunk.shape for chunk in weight.chunks} == {(1, 1, *shape)}


def test_the_planner_knows_the_weights(converted):
    llm = LLM(converted[2])
    held = sum(weight.numel() for weight in llm.engine.stage.model.parameters())
    assert weight_elements(llm.description.model, Layout(1, 1, 1, 1), 0) == held


def test_megatron_is_told_of_every_norm_of_queries_and_keys(converted):
    """Release 0.19 refuses to build layers whose spec has some that the configuration does not know of."""
    llm = LLM(converted[2])
    layer = llm.engine.stage.model.decoder.layers[0]
    has_some = any(name.endswith("q_layernorm.weight") for name, _ in layer.named_parameters())
    assert layer.config.qk_layernorm == has_some == (llm.description.model.qk_norm != "none")


def values_of(family, **changed):
    import transformers

    config = getattr(transformers, f"{family}Config")(vocab_size=131, hidden_size=64, num_attention_heads=4).to_dict()
    return {**config, "sliding_window": None, **changed}


def whole_of_mistral(text):
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

    config = Mistral3Config(vision_config=PixtralVisionConfig(**VISION), text_config=text, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


def whole_of_gemma(text):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    config = Gemma3Config(vision_config=SiglipVisionConfig(**VISION), text_config=text, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    ("case", "whole_of", "prefixes"),
    [
        ("ministral3", whole_of_mistral, {}),
        ("gemma3", whole_of_gemma, {}),
        # As transformers 4.52 and later hold it.
        ("gemma3", whole_of_gemma, {"language_model.model.": "model.language_model.", "": "model."}),
    ],
)
def test_the_language_model_of_one_that_sees(tmp_path, case, whole_of, prefixes):
    alone = save_model(tmp_path / "alone", case)
    whole = whole_of(alone.config)
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    whole.lm_head.load_state_dict(alone.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "hf")
    if prefixes:
        renamed = {}
        for name, weight in load_file(tmp_path / "hf" / "model.safetensors").items():
            old = next(prefix for prefix in prefixes if name.startswith(prefix))
            renamed[prefixes[old] + name.removeprefix(old)] = weight
        save_file(renamed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    description = import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert description.architecture == type(alone).__name__
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    loaded = type(alone).from_pretrained(tmp_path / "back", dtype="auto").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in alone.state_dict().items())
    assert loaded.keys() == alone.state_dict().keys()


REFUSED = {
    "an activation": ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    "a key that nobody knows": ("Llama", {"logit_scale": 0.5}, "logit_scale=0.5: not known for LlamaForCausalLM"),
    "a rope kind": (
        "Llama",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "rope scaling of type 'proportional' is not supported",
    ),
    "a key of a rope kind": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "scale": 3.0}},
        "type 'linear' with scale is not supported",
    ),
    "a part of Llama's dimensions": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
    "two bases": (
        "Llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 1.0}}},
        "with full_attention, sliding_attention is not supported",
    ),
    "longrope without factors": (
        "Phi3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "lacks short_factor, long_factor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case):
    family, changed, message = REFUSED[case]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        families()[f"{family}ForCausalLM"].model_config(values_of(family, **changed))


@pytest.mark.parametrize(
    ("tp", "cp", "ep"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 2), (1, 4, 4), (2, 2, 4), (2, 2, 2), (4, 2, 8), (4, 2, 4), (2, 4, 1)],
)
def test_every_slice_of_every_expert_has_one_place(tp, cp, ep):
    layout = Layout(tp, cp, 1, 1, ep)
    places = [ExpertLayout(layout, t, c) for c in range(cp) for t in range(tp)]
    held = {(place.ep_rank, place.expert_tp_rank) for place in places}
    assert held == {(e, t) for e in range(ep) for t in range(places[0].expert_tp)}
    copies = tp * cp // (ep * places[0].expert_tp)
    assert copies == (1 if places[0].over_cp else cp)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(1, 1, 1, 1, 2), "on 1 tensor-parallel and 1 context-parallel ranks of a replica; possible: 1"),
        (Layout(2, 4, 1, 1, 16), "possible: 1, 2, 4, 8"),
        (Layout(1, 3, 1, 1, 3), "=3 does not divide the model's 16 experts"),
    ],
)
def test_experts_that_ranks_cannot_divide_are_refused(layout, message):
    values = values_of("Mixtral", num_local_experts=16, num_key_value_heads=4)
    model = families()["MixtralForCausalLM"].model_config(values)
    with pytest.raises(ValueError, match=message):
        check_experts(model, layout)


def test_experts_do_not_go_with_a_divided_sequence():
    model = families()["MixtralForCausalLM"].model_config(values_of("Mixtral", num_key_value_heads=4))
    with pytest.raises(ValueError, match="sequence_parallel=true is not supported for a mixture of experts"):
        check_experts(model, Layout(2, 1, 1, 1), sequence_parallel=True)


def test_answers_past_the_original_length_are_warned_of(tmp_path):
    save_model(tmp_path / "hf", "phi3-short")
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    llm = LLM(tmp_path / "converted")
    assert llm.check(150, 50) == []
    assert "take longrope's factors for up to 200 positions" in llm.check(150, 51)[0]
    assert llm.check(201, 30) == []


def test_positions_that_compute_otherwise_are_refused(tmp_path):
    save_model(tmp_path / "hf", "qwen2")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    config["dual_chunk_attention_config"] = {"chunk_size": 120, "local_size": 20}
    file.write_text(json.dumps(config))
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    llm = LLM(tmp_path / "converted")
    with pytest.raises(ValueError, match="up to 101 positions.*from position 100 on"):
        llm.encode(tokens(101, seed=1))
    book = llm.encode(tokens(90, seed=1))
    with pytest.raises(ValueError, match="up to 102 positions.*from position 100 on"):
        llm.generate(book, [[5, 6]], SamplingParams(max_tokens=10))
    assert len(llm.generate(book, [[5, 6]], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids) == 8
