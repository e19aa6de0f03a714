"""The service through the official client, on two ranks; answers against `LLM` and transformers."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from launch import ROOT, run_tool
from serving import service
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_star import LLM, SamplingParams
from nemo_star.evaluation.needles import make_document, question

BLOCK = 512
DOCUMENTS = [make_document(random.Random(f"serve {i}"), filler_sentences=60, needles=3) for i in range(3)]
DOCUMENT = DOCUMENTS[0]
KEY, VALUE = next(iter(DOCUMENT.needles.items()))
HELLO = "Nothing but a line about the weather of today"


@pytest.fixture(scope="module")
def server(demo):
    with service(
        demo,
        f"attention.block_size={BLOCK}",
        "server.keepalive_seconds=0.005",
        "server.max_context_tokens=null",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llm(demo, groups):
    return LLM(demo, attention={"kind": "star", "block_size": BLOCK})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "assets/demo_model", local_files_only=True)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def messages(document, key):
    return [{"role": "user", "content": f"{document.text}\n\n{question(key)}"}]


def expected(llm, tokenizer, document, query, params):
    """The same by the front door: the plain template puts BOS before, and an empty line between."""
    whole = f"{document.text}\n\n{query}"
    at = len(whole) - len(query)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    cut = sum(stop <= at for _, stop in encoded["offset_mapping"])
    book = llm.encode([tokenizer.bos_token_id, *encoded["input_ids"][:cut]])
    return book, llm.generate(book, [encoded["input_ids"][cut:]], params)[0]


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.models.retrieve("nope")


def test_an_answer_its_stream_and_its_counts(client, llm, tokenizer):
    asked = {"model": "demo", "messages": messages(DOCUMENT, KEY), "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    book, result = expected(llm, tokenizer, DOCUMENT, question(KEY), SamplingParams(max_tokens=16))
    assert whole.choices[0].message.content == result.text
    assert whole.choices[0].message.content.strip() == VALUE
    assert whole.choices[0].finish_reason == result.finish_reason == "stop"
    assert whole.usage.completion_tokens == len(result.token_ids)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == result.text
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == book.tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_samples_are_those_of_their_seeds(client, llm, tokenizer):
    params = SamplingParams(max_tokens=12, temperature=3.0, top_p=0.95, seed=77, n=3, ignore_eos=True)
    asked = {"model": "demo", "messages": messages(DOCUMENT, KEY), "max_tokens": 12, "temperature": 3.0, "top_p": 0.95}
    _, result = expected(llm, tokenizer, DOCUMENT, question(KEY), params)
    texts = [sample.text for sample in result.samples]
    assert len(set(texts)) > 1
    asked |= {"seed": 77, "n": 3, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == texts
    streamed = [""] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    without_seed = [client.chat.completions.create(**{**asked, "seed": None, "n": 1}) for _ in range(4)]
    assert len({answer.choices[0].message.content for answer in without_seed}) > 1


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client):
    end = VALUE[3:5]
    asked = {"model": "demo", "messages": messages(DOCUMENT, KEY), "max_completion_tokens": 16, "stop": [end, "zzz"]}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content.strip() == VALUE[: VALUE.index(end)]
    assert whole.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True))
    assert streamed == whole.choices[0].message.content


def test_logprobs_are_those_of_transformers(client, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "assets/demo_model", dtype=torch.float32)
    prompt = [tokenizer.bos_token_id, *ids(tokenizer, HELLO)]
    asked = {"model": "demo", "prompt": HELLO, "max_tokens": 3, "logprobs": 2, "echo": True}
    asked["extra_body"] = {"ignore_eos": True}
    (choice,) = client.completions.create(**asked).choices
    assert choice.text.startswith(HELLO)
    found = choice.logprobs
    tokens = list(prompt)
    for row in range(len(prompt) + 3):
        if row >= len(prompt):
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    for row in range(1, len(tokens)):
        assert found.token_logprobs[row] == pytest.approx(float(logprobs[row - 1, tokens[row]]), abs=5e-4)
        assert max(found.top_logprobs[row].values()) == pytest.approx(float(logprobs[row - 1].max()), abs=5e-4)
    assert "".join(found.tokens[1 : len(prompt)]).strip() == HELLO
    alone = client.completions.create(**{**asked, "max_tokens": 0}).choices[0]
    assert alone.text == HELLO
    assert alone.logprobs.token_logprobs == found.token_logprobs[: len(prompt)]
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": HELLO}],
        max_tokens=2,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    content = chat.choices[0].logprobs.content
    assert [len(each.top_logprobs) for each in content] == [3, 3]
    for row, each in enumerate(content):
        exact = float(logprobs[len(prompt) - 1 + row, tokens[len(prompt) + row]])
        assert each.logprob == pytest.approx(exact, abs=5e-4)


def test_prompts_are_text_or_tokens_one_or_several(client, tokenizer):
    text = f"{DOCUMENT.text}\n\n{question(KEY)}"
    tokens = [tokenizer.bos_token_id, *ids(tokenizer, text)]
    several = client.completions.create(model="demo", prompt=[text, HELLO], max_tokens=16)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text.strip() == VALUE
    one = client.completions.create(model="demo", prompt=HELLO, max_tokens=16)
    assert one.choices[0].text == several.choices[1].text
    of_tokens = client.completions.create(model="demo", prompt=tokens, max_tokens=16, extra_body={"query_tokens": 40})
    assert of_tokens.choices[0].text.strip() == VALUE
    assert of_tokens.usage.prompt_tokens == len(tokens)


def test_a_named_context_is_encoded_once(server, client):
    document = DOCUMENTS[1]
    before = server.total("nemo_star_context_tokens_encoded_total")
    created = httpx.post(f"{server.address}/v1/contexts", files={"file": document.text}, data={"name": "report"})
    assert created.status_code == 202
    context = created.json()
    assert httpx.post(f"{server.address}/v1/contexts", json={"text": "x", "name": "report"}).status_code == 409
    for turn, (key, value) in enumerate(document.needles.items()):
        name = ("report", context["id"])[turn % 2]
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question(key)}],
            max_tokens=16,
            extra_body={"context": name},
        )
        assert answer.choices[0].message.content.strip() == value
        assert answer.usage.prompt_tokens_details.cached_tokens == context["tokens"]
    key, value = next(iter(document.needles.items()))
    said = [
        {"role": "user", "content": question(key)},
        {"role": "assistant", "content": value},
        {"role": "user", "content": question(list(document.needles)[1])},
    ]
    asked = {"model": "demo", "max_tokens": 16, "extra_body": {"context": "report"}}
    answer = client.chat.completions.create(messages=said, **asked)
    assert answer.choices[0].message.content.strip() == list(document.needles.values())[1]
    with pytest.raises(openai.BadRequestError, match="user and assistant in turn"):
        client.chat.completions.create(messages=[{"role": "system", "content": "Hi"}, *said], **asked)
    state = httpx.get(f"{server.address}/v1/contexts/report").json()
    assert state["status"] == "ready"
    assert server.total("nemo_star_context_tokens_encoded_total") - before == context["tokens"]
    assert [each["id"] for each in httpx.get(f"{server.address}/v1/contexts").json()["data"]] == [context["id"]]
    assert httpx.delete(f"{server.address}/v1/contexts/report").json()["deleted"]
    with pytest.raises(openai.NotFoundError, match="there is no context"):
        client.chat.completions.create(messages=said, **asked)


def test_a_breakpoint_ends_the_context(client):
    document = DOCUMENTS[2]
    key, value = next(iter(document.needles.items()))
    parts = [
        {"type": "text", "text": document.text + "\n\n", "prompt_cache_breakpoint": True},
        {"type": "text", "text": question(key)},
    ]
    asked = {"model": "demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 16}
    first, second = (client.chat.completions.create(**asked, prompt_cache_key="any") for _ in range(2))
    assert first.choices[0].message.content.strip() == value
    assert second.usage.prompt_tokens_details.cached_tokens > 0.9 * second.usage.prompt_tokens


def test_progress_and_signs_of_life(server):
    document = make_document(random.Random("progress"), filler_sentences=200, needles=1)
    (key,) = document.needles
    asked = {"messages": messages(document, key), "max_tokens": 16, "stream": True, "return_progress": True}
    with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=asked, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert any(line.startswith(":") for line in lines)
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert [each["blocks_done"] for each in progress] == sorted(each["blocks_done"] for each in progress)
    assert progress[-1]["blocks_done"] == progress[-1]["blocks"] == -(-progress[-1]["total"] // BLOCK)
    assert len(progress[-1]["by_cp_rank"]) == 2
    assert progress[-1]["processed"] == progress[-1]["total"]
    assert progress[0]["seconds_left"] > 0
    assert lines[-1] == "data: [DONE]"
    # Also where progress is not asked for: nothing else is sent, though things happen.
    other = make_document(random.Random("no progress"), filler_sentences=200, needles=1)
    asked |= {"messages": messages(other, next(iter(other.needles))), "return_progress": False}
    with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=asked, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert [line for line in lines[1:4] if line.startswith(":")]


def test_a_client_that_gives_up_and_tries_again_pays_once(server, client):
    document = make_document(random.Random("impatient"), filler_sentences=400, needles=1)
    ((key, value),) = document.needles.items()
    before = server.total("nemo_star_blocks_encoded_total")
    asked = {"model": "demo", "messages": messages(document, key), "max_tokens": 16}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True, extra_body={"return_progress": True}) as stream:
        progress = next(chunk.prompt_progress for chunk in stream if getattr(chunk, "prompt_progress", None))
    assert progress["blocks_done"] < progress["blocks"]  # it goes away in the middle
    answer = client.with_options(max_retries=2).chat.completions.create(**asked)
    assert answer.choices[0].message.content.strip() == value
    assert server.total("nemo_star_blocks_encoded_total") - before == progress["blocks"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model": "nope"}, openai.NotFoundError, "does not exist"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "at most 16384"),
        ({"extra_body": {"min_p": 0.1}}, openai.BadRequestError, "min_p: unknown field"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, "known roles"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.APIStatusError, "server.max_query_tokens"),
        ({"messages": messages(DOCUMENT, KEY), "max_tokens": 8000}, openai.BadRequestError, "maximum context length"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(client, values, error, message):
    asked = {"model": "demo", "messages": [{"role": "user", "content": HELLO}], "max_tokens": 4}
    with pytest.raises(error, match=message):
        client.chat.completions.create(**{**asked, **values})


@pytest.mark.parametrize("streams", [pytest.param(8, marks=pytest.mark.slow), 32])
def test_streams_side_by_side_have_the_tokens_of_those_alone(client, streams):
    pairs = [(document, key) for document in DOCUMENTS for key in document.needles]

    def answer(number):
        document, key = pairs[number % len(pairs)]
        asked = {"model": "demo", "messages": messages(document, key), "max_tokens": 24, "seed": number}
        asked |= {"temperature": 0.0 if number % 2 else 2.0, "extra_body": {"ignore_eos": True}}
        chunks = client.chat.completions.create(**asked, stream=True, logprobs=True)
        return [each.token for chunk in chunks for c in chunk.choices if c.logprobs for each in c.logprobs.content]

    alone = [answer(number) for number in range(streams)]
    assert {len(tokens) for tokens in alone} == {24}
    with ThreadPoolExecutor(streams) as pool:
        assert list(pool.map(answer, range(streams))) == alone


def test_the_benchmark_of_a_service(server):
    measured = ["--streams", "2", "--beside", "1500", "--requests", "10", "--contexts", "3", "--context-tokens", "700"]
    done = run_tool(ROOT / "tools/benchmark_serve.py", "--url", server.address, "--tokens", "8", *measured)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["side_by_side"][0]["different_texts"] == 0
    assert found["many_contexts"]["right"] == 10
    assert found["beside_a_prefill"]["longest_gap_seconds"] > 0
    refused = run_tool(ROOT / "tools/benchmark_serve.py", "--url", server.address)
    assert refused.returncode == 1
    assert "nothing to measure" in refused.stderr


@pytest.mark.slow
def test_a_thousand_questions_on_more_contexts_than_memory_takes(demo):
    """K/V of a context of 1,750 tokens take 5.4 MB on the rank that has it: four of ten fit."""
    asked = ["--requests", "1000", "--contexts", "10", "--context-tokens", "2000"]
    with service(demo, "cache.budget_gib=0.0205") as running:
        done = run_tool(ROOT / "tools/benchmark_serve.py", "--url", running.address, *asked, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    many = json.loads(done.stdout)["many_contexts"]
    assert many["right"] == 1000
    assert 0 < many["from_cache"] < 1000
    assert many["kv_bytes"] <= many["kv_budget_bytes"]
    assert many["resident_mib"][-1] < 1.1 * many["resident_mib"][2]


def test_nothing_is_left_under_way(server):
    metrics = server.metrics()
    for name in ("requests_waiting", "requests_running", "answers_live", "encodings"):
        assert metrics[f"nemo_star_{name}"] == 0
    assert metrics['nemo_star_kv_tokens{cp_rank="0"}'] > 0
    assert not any("Traceback" in line for line in server.lines)
