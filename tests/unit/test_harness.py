"""`nemo_star` as a model of lm-evaluation-harness, in one process: the same results as the harness's own `hf` model."""

import copy

import pytest
import torch
from launch import ROOT

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nemo-star[harness]'")

from harness_tasks import ask, asked, same

from nemo_star.config.harness import HarnessConfig
from nemo_star.evaluation.harness import scoring
from nemo_star.evaluation.harness.arguments import sampling
from nemo_star.evaluation.harness.model import NemoStar
from nemo_star.evaluation.harness.prompts import Cut, Prompts
from nemo_star.llm.front import LLM
from nemo_star.text.tokenizer import Tokenizer

DEMO = ROOT / "assets" / "demo_model"
ATTENTION = {"dense": {"kind": "dense"}, "one block": {"kind": "star", "block_size": 8192}}


@pytest.fixture(scope="module")
def theirs():
    """transformers' model and tokenizer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def llms(demo):
    return {name: LLM(demo, dtype="float32", attention=attention) for name, attention in ATTENTION.items()}


@pytest.mark.parametrize("max_length", [None, 60])
def test_results_are_those_of_the_harness_s_own_model(llms, theirs, max_length):
    pytest.importorskip("accelerate", reason="the harness's `hf` needs accelerate: pip install 'nemo-star[clients]'")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = theirs
    expected = ask(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length), asked())
    assert len(set(expected["generate_until"])) > 3
    for name, llm in llms.items():
        assert same(ask(NemoStar(llm, max_length=max_length), asked()), expected), name


def test_scores_are_those_of_transformers(llms, theirs):
    model, tokenizer = theirs
    requests = {"loglikelihood": [pair for pair in asked()["loglikelihood"] if pair[0].strip()]}
    found = ask(NemoStar(llms["one block"]), requests)["loglikelihood"]
    assert [is_greedy for _, is_greedy in found].count(True) >= 3
    for (context, continuation), (logprob, is_greedy) in zip(requests["loglikelihood"], found, strict=True):
        ids, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context.rstrip())["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        expected = torch.tensor(ids[start:])
        assert logits.log_softmax(-1).gather(1, expected[:, None]).sum().item() == pytest.approx(logprob, abs=5e-4)
        assert bool((logits.argmax(-1) == expected).all()) == is_greedy


def test_pieces_of_a_step_change_nothing(llms, monkeypatch):
    lm = NemoStar(llms["dense"])
    requests = {method: given[:4] for method, given in asked().items() if method != "generate_until"}
    requests["loglikelihood_rolling"] = [("The captain found a letter near the harbor.",)]
    whole = ask(lm, requests)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 17 * llms["dense"].description.model.vocab_size)
    sizes = []
    decode = lm._llm.engine.decode
    monkeypatch.setattr(lm._llm.engine, "decode", lambda batch, **options: count(decode, list(batch), sizes, options))
    in_pieces = ask(lm, requests)
    assert max(sizes) == 17
    assert same({**in_pieces, "generate_until": []}, {**whole, "generate_until": []})


def count(decode, batch, sizes, options):
    sizes.append(sum(len(tokens) for _, tokens in batch))
    return decode(batch, **options)


def test_a_context_is_encoded_once_and_choices_of_one_token_run_together(llms, monkeypatch):
    lm = NemoStar(llms["one block"])
    engine = lm._llm.engine
    encoded, runs = [], []
    begin, decode = engine.begin, engine.decode
    monkeypatch.setattr(engine, "begin", lambda ids: encoded.append(len(ids)) or begin(ids))
    monkeypatch.setattr(engine, "decode", lambda batch, **options: count(decode, list(batch), runs, options))
    (document, *_) = asked()["generate_until"][0][0].split("\n")
    one_token = [(f"{document}\nAnswer{number}:", choice) for number in range(2) for choice in "ABCD"]
    found = ask(lm, {"loglikelihood": one_token})["loglikelihood"]
    assert len(encoded) == 1
    queries = [len(lm._texts.cut(f"{document}\nAnswer{number}:").query) for number in range(2)]
    assert runs == [size for query in queries for size in (query - 1, 1)]
    assert len({logprob for logprob, _ in found}) == 8


def test_the_query_is_the_last_line(theirs):
    prompts = Prompts(Tokenizer(theirs[1]), query="last_line", add_bos=False)
    paragraphs = Prompts(Tokenizer(theirs[1]), query="last_paragraph", add_bos=False)
    decode = theirs[1].decode

    def parts(cut):
        return decode(cut.context).strip(), decode(cut.query).strip()

    text = "The sky is blue.\n\nQuestion: where?\nAnswer:"
    assert parts(prompts.cut(text)) == ("The sky is blue.\n\nQuestion: where?", "Answer:")
    assert parts(prompts.cut(text + " \n")) == parts(prompts.cut(text))
    assert parts(paragraphs.cut(text)) == ("The sky is blue.", "Question: where?\nAnswer:")
    for text in ("One line", "\n\nOne line\n"):
        assert prompts.cut(text).context == []
        assert parts(prompts.cut(text))[1] == "One line"
    for text in ("a\nb", "One line", "x\n\n  y z \n"):
        cut = prompts.cut(text)
        assert cut.context + cut.query == prompts.encode(text)
    with pytest.raises(ValueError, match="holds no token"):
        prompts.cut("")
    with pytest.raises(ValueError, match="query='line' must be last_line or last_paragraph"):
        Prompts(Tokenizer(theirs[1]), query="line", add_bos=None)


@pytest.mark.parametrize("puts_bos", [False, True])
def test_special_tokens_are_the_tokenizer_s(theirs, puts_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(theirs[1])
    # The demo's own puts it, at the start of a text.
    template = TemplateProcessing(single=f"{'<s> ' * puts_bos}$A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    prompts = Prompts(Tokenizer(tokenizer), query="last_line", add_bos=None)
    for text in ("One line", "a\nb"):
        assert prompts.encode(text) == tokenizer.encode(text)
        cut = prompts.cut(text)
        assert cut.context + cut.query == tokenizer.encode(text)
    with_bos = tokenizer.encode("<s>a\nb", add_special_tokens=False)
    assert prompts.encode("<s>a\nb") == with_bos
    assert prompts.encode("a", special=True)[0] == tokenizer.bos_token_id
    assert Prompts(Tokenizer(tokenizer), query="last_line", add_bos=not puts_bos).encode("a") != tokenizer.encode("a")


def test_what_is_too_long_loses_its_beginning():
    cut = Cut([1, 2, 3], [4, 5])
    assert cut.shortened(9) == cut.shortened(5) == cut
    assert cut.shortened(4) == Cut([2, 3], [4, 5])
    assert cut.shortened(1) == Cut([], [5])


def test_arguments_of_generation():
    params = sampling({"until": ["\n", ""], "max_gen_toks": 7, "temperature": 0.0}, 3, default_tokens=256)
    assert (params.max_tokens, params.temperature, params.stop) == (7, 0.0, ("\n",))
    assert sampling({"do_sample": False, "temperature": 0.7, "num_beams": 1}, 0, default_tokens=9).temperature == 0
    params = [
        sampling({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.5}, n, default_tokens=9) for n in (0, 1)
    ]
    assert (params[0].temperature, params[0].top_k, params[0].top_p, params[0].max_tokens) == (0.7, 5, 0.5, 9)
    assert params[0].seed != params[1].seed
    with pytest.raises(ValueError, match="num_beams=4 is not implemented"):
        sampling({"num_beams": 4}, 0, default_tokens=9)


def test_requests_that_cannot_be_answered(llms):
    lm = NemoStar(llms["dense"], max_length=16)
    with pytest.raises(ValueError, match="max_gen_toks=16 leaves nothing of max_length=16"):
        ask(lm, {"generate_until": [("a", {"max_gen_toks": 16})]})
    with pytest.raises(ValueError, match="a continuation of 0 tokens cannot be scored"):
        ask(lm, {"loglikelihood": [("a b", "")]})


def test_by_its_name_with_the_keys_of_a_recipe(demo):
    from lm_eval.api.registry import get_model

    arguments = f"checkpoint={demo},attention=star,attention.block_size=64,max_length=100,query=last_paragraph"
    lm = get_model("nemo_star").create_from_arg_string(arguments, {"batch_size": "3"})
    assert isinstance(lm, NemoStar)
    info = lm.get_model_info()
    assert (info["attention"]["kind"], info["attention"]["block_size"]) == ("star", 64)
    assert (lm.max_length, lm._llm.max_batch_size) == (100, 3)
    with pytest.raises(ValueError, match="unknown key attention.block"):
        NemoStar.create_from_arg_string(f"checkpoint={demo},attention.block=64")


def test_keys():
    assert HarnessConfig(checkpoint="DIR", tasks=("a",), limit=0.5).limit == 0.5
    for wrong, message in (
        ({"tasks": ()}, "tasks is empty"),
        ({"limit": 0}, "limit=0 must be above 0"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"include_defaults": False}, "include_defaults=false leaves no tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            HarnessConfig(**{"checkpoint": "DIR", "tasks": ("a",), **wrong})
