"""Messages -> context and query, with templates of six families, against transformers' apply_chat_template."""

import json
import random
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as rendering
from chat import FAMILIES, save_tokenizer, template

from nemo_star import LLM, SamplingParams
from nemo_star.evaluation.needles import make_document, question
from nemo_star.text import tokenizer as tokenizer_module
from nemo_star.text.chat import split_messages
from nemo_star.text.messages import start_of_question
from nemo_star.text.stream import TextStream
from nemo_star.text.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent.parent / "assets" / "demo_model"
DOCUMENT = "The whale swam north.\n\nIt was the best of times.\n"
QUESTION = "Who saw\nthe whale?"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def part(text, **more):
    return {"type": "text", "text": text, **more}


ONE = [user(f"{DOCUMENT}\nWho saw it? ")]
TURNS = [user(DOCUMENT), assistant("Yes."), user(QUESTION)]
CHATS = {
    "one": ONE,
    "line": [user(f"{DOCUMENT.strip()[:15]}\nWho?")],
    "system": [system(DOCUMENT), user("Who saw it?")],
    "turns": TURNS,
    "system-turns": [system("Be brief.\n"), *TURNS, assistant("<think>\nwell\n</think>\nA man."), user(" Which?")],
    "parts": [user([part(DOCUMENT), part("\n"), part("Who saw\n it?")])],
    "breakpoint": [user([part(DOCUMENT, prompt_cache_breakpoint=True), part("Who\n\nsaw it?")])],
    "early": [user([part(DOCUMENT, prompt_cache_breakpoint=True)]), assistant("Yes."), user(QUESTION)],
    "inside-a-word": [user([part("The wha", prompt_cache_breakpoint=True), part("le swam. Who?")])],
    "at-the-end": [user([part("The whale swam."), part("Who? ", prompt_cache_breakpoint=True)])],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {family: Tokenizer.load(save_tokenizer(folder / family, family)) for family in FAMILIES}


def as_text(messages):
    """The same messages, their parts joined."""
    contents = [message["content"] for message in messages]
    texts = [text if isinstance(text, str) else "".join(part["text"] for part in text) for text in contents]
    return [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]


def texts_of(tokenizer, ids):
    return tuple(tokenizer.hf.decode(part) for part in ids)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_template(tokenizers, family, name):
    """One after the other; text is in the part where the rules put it."""
    tokenizer, messages = tokenizers[family], CHATS[name]
    if family == "gemma" and messages[0]["role"] == "system":
        with pytest.raises(ValueError, match="chat template cannot be applied: no system role, please"):
            split_messages(tokenizer, messages)
        return
    context, query = split_messages(tokenizer, messages)
    whole = tokenizer.hf.apply_chat_template(as_text(messages), add_generation_prompt=True, return_dict=False)
    assert context + query == whole
    before, after = texts_of(tokenizer, (context, query))
    wanted = {
        "one": (DOCUMENT.strip(), "Who saw it?"),
        "line": ("The whale swam", "Who?"),
        "system": (DOCUMENT.strip(), "Who saw it?"),
        "turns": (DOCUMENT.strip(), QUESTION),
        "system-turns": (DOCUMENT.strip(), "Which?"),
        "parts": (DOCUMENT.strip(), "Who saw\n it?"),
        "breakpoint": (DOCUMENT.strip(), "Who\n\nsaw it?"),
        "early": (DOCUMENT.strip(), QUESTION),
        "inside-a-word": ("The", "le swam. Who?"),
        "at-the-end": ("The whale swam.Who?", ""),
    }[name]
    assert wanted[0] in before
    assert wanted[1] in after
    assert wanted[0] not in after


@pytest.mark.parametrize(
    ("family", "name", "query"),
    [
        ("llama3", "turns", "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"),
        ("llama3", "one", "{}<|eot_id|>"),
        ("mistral", "turns", "[INST] {} [/INST]"),
        ("mistral", "system", "{} [/INST]"),  # the system's text stands in the same turn
        ("chatml", "turns", "<|im_start|>user\n{}<|im_end|>\n"),
        ("chatml", "system", "<|im_start|>user\n{}<|im_end|>\n"),
        ("chatml", "system-turns", " {}<|im_end|>\n"),  # as a last turn, the one before it has its thoughts
        ("gemma", "turns", "<start_of_turn>user\n{}<end_of_turn>\n"),
        ("phi3", "turns", "<|user|>\n{}<|end|>\n"),  # though without a generation prompt all ends in </s>
        ("harmony", "turns", "<|start|>user<|message|>{}<|end|>"),
        ("harmony", "at-the-end", " <|end|>"),
    ],
)
def test_the_query_begins_with_the_header_of_its_turn_where_that_can_be_told(tokenizers, family, name, query):
    tokenizer = tokenizers[family]
    prompts = {
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "",
        "chatml": "<|im_start|>assistant\n",
        "gemma": "<start_of_turn>model\n",
        "phi3": "<|assistant|>\n",
        "harmony": "<|start|>assistant",
    }
    asked = {"one": "Who saw it?", "system": "Who saw it?", "turns": QUESTION, "system-turns": "Which?"}
    found = texts_of(tokenizer, split_messages(tokenizer, CHATS[name]))[1].lstrip("\n")
    assert found.removesuffix(prompts[family]) in (
        query.format(asked.get(name)),
        query.format(asked.get(name)).lstrip(),
    )


@pytest.mark.parametrize("family", ["llama3", "chatml"])
def test_messages_of_a_tool(tokenizers, family):
    messages = [user(DOCUMENT), assistant("Looking."), {"role": "tool", "content": "42"}, user(QUESTION)]
    context, query = split_messages(tokenizers[family], messages)
    expected = tokenizers[family].hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert context + query == expected
    assert "42" in texts_of(tokenizers[family], [context])[0]
    ends = split_messages(tokenizers[family], [user(DOCUMENT), assistant("."), user("Who?"), messages[2]])
    assert "42" in texts_of(tokenizers[family], ends)[1]


def test_a_call_of_a_tool_has_no_content(tokenizers):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    hf = tokenizers["chatml"].hf
    hf.chat_template = "{% for m in messages %}{{ m.content or (m.tool_calls | tojson) }}|{% endfor %}"
    messages = [user(DOCUMENT), calls, {"role": "tool", "content": "42"}, user(QUESTION)]
    try:
        context, query = split_messages(tokenizers["chatml"], messages)
        assert context + query == hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    finally:
        hf.chat_template = template("chatml")


def test_variables_of_the_template(tokenizers):
    tokenizer = tokenizers["chatml"]
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        context, query = split_messages(tokenizer, ONE, template_kwargs=kwargs)
        whole = tokenizer.hf.apply_chat_template(ONE, add_generation_prompt=True, return_dict=False, **kwargs)
        assert context + query == whole
        assert ("<think>" in texts_of(tokenizer, [query])[0]) == (kwargs == {"enable_thinking": False})
    low = split_messages(tokenizers["harmony"], ONE, template_kwargs={"reasoning_effort": "low"})
    assert "Reasoning: low" in texts_of(tokenizers["harmony"], low)[0]
    with pytest.raises(ValueError, match="chat_template_kwargs holds tokenize: it takes"):
        split_messages(tokenizer, ONE, template_kwargs={"tokenize": True})


@pytest.mark.parametrize("family", ["llama3", "chatml", "gemma"])
def test_an_answer_that_has_begun(tokenizers, family):
    hf = tokenizers[family].hf
    messages = [*ONE, assistant("It was the")]
    context, query = split_messages(tokenizers[family], messages, continue_final_message=True)
    assert context + query == hf.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    before, after = texts_of(tokenizers[family], (context, query))
    assert after.startswith("Who saw it?")
    assert after.endswith("It was the")


def test_the_date_may_change_between_two_looks(tokenizers, monkeypatch):
    class Clock(datetime):
        looks = 0

        @classmethod
        def now(cls, tz=None):
            cls.looks += 1
            return datetime(2024, 7, 26, 23, 59) + timedelta(days=cls.looks > 1)

    monkeypatch.setattr(rendering, "datetime", Clock)
    before, after = texts_of(tokenizers["llama3"], split_messages(tokenizers["llama3"], ONE))
    assert "Today is 27 Jul 2024." in before
    assert after.startswith("Who saw it?")
    assert Clock.looks > 2


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("a\n\nb", "b"),
        ("a\n\nb\nc \n\n", "b\nc"),
        ("a\n\nb\n \t\n  c", "c"),
        ("a\r\n\r\nb", "b"),
        ("a\n\n\n\nb", "b"),
        ("a\nb\nc", "c"),
        ("a\n  b\n", "b"),
        ("\n\na b", None),
        ("a", None),
        ("\n \n", None),
        ("", None),
    ],
)
def test_the_question_is_the_last_paragraph_or_line(text, question):
    start = start_of_question(text)
    assert (None if start is None else text[start:].rstrip()) == question


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one"),
        ("x", "messages must be a list of at least one"),
        (["x"], "messages[0] must be an object with role and content, not str"),
        (
            [{"role": "human", "content": "a"}],
            "messages[0] has role 'human'; known roles: system, user, assistant, tool",
        ),
        ([{"content": "a"}], "messages[0] has role None"),
        ([{"role": "user"}], "messages[0]: content must be a string or a list of text parts, not NoneType"),
        ([user(5)], "content must be a string or a list of text parts, not int"),
        (
            [user([part("a"), {"type": "image_url", "image_url": {"url": "u"}}])],
            "messages[0] has a part of type 'image_url'",
        ),
        ([user(["a"])], "messages[0] has a part of type 'str'"),
        ([user([{"type": "text", "text": None}])], "the text of a part must be a string, not NoneType"),
        ([user([part("a", prompt_cache_breakpoint=1)])], "prompt_cache_breakpoint=1 must be true or false"),
        ([user("a\n\n\ud800")], "messages[0] holds half of a surrogate pair"),
        ([*ONE, assistant("So")], "the last message has role 'assistant': end with the user's, or give continue_final"),
        ([*ONE, system("So")], "the last message has role 'system'"),
        ([system("a"), {"role": "tool", "content": "b"}], "messages hold none of the user"),
        ([system("a"), user(" \n")], "messages[1], the last one of the user, is empty"),
        ([user("Who?")], "Put a blank line before the question"),
        ([system(" "), user("Who?")], "Put a blank line before the question"),
        (
            [user([part(" ", prompt_cache_breakpoint=True)])],
            "messages[0] is empty: prompt_cache_breakpoint needs a text",
        ),
    ],
)
def test_what_is_wrong_with_messages_is_named(tokenizers, messages, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        split_messages(tokenizers["chatml"], messages)
    assert message in str(error.value)


def test_what_a_template_does_not_take_is_named(tokenizers):
    tool = [user(DOCUMENT), assistant("a"), {"role": "tool", "content": "42"}, user("Who?")]
    with pytest.raises(ValueError, match=r"template leaves out messages\[2\], of role 'tool'"):
        split_messages(tokenizers["phi3"], tool)
    with pytest.raises(ValueError, match="cannot be applied: roles must alternate between user and assistant"):
        split_messages(tokenizers["mistral"], [user(DOCUMENT), user("Who?")])
    with pytest.raises(ValueError, match="continue_final_message goes on with a last message of role assistant"):
        split_messages(tokenizers["chatml"], ONE, continue_final_message=True)
    with pytest.raises(ValueError, match="continue_final_message='yes' must be true or false"):
        split_messages(tokenizers["chatml"], ONE, continue_final_message="yes")
    with pytest.raises(ValueError, match="no chat template"):
        split_messages(Tokenizer.load(DEMO), ONE)
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer: give token ids"):
        split_messages(None, ONE)


def test_a_template_that_changes_the_text_is_refused(tokenizers):
    hf = tokenizers["chatml"].hf
    hf.chat_template = "{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}"
    try:
        with pytest.raises(ValueError, match=r"does not give the text of messages\[0\] once and unchanged"):
            split_messages(tokenizers["chatml"], ONE)
    finally:
        hf.chat_template = template("chatml")


class WithoutOffsets:
    """A Hugging Face tokenizer that does not say which characters a token is of."""

    def __init__(self, hf):
        self._hf = hf

    def __call__(self, texts, **options):
        return {"input_ids": self._hf(texts, **options)["input_ids"]}


@pytest.mark.parametrize("text", [DOCUMENT + QUESTION, "Ünïcode 你好 <|im_end|>\n\n  x", "whale" * 3])
def test_a_cut_anywhere_leaves_the_tokens_as_they_are(tokenizers, text):
    hf = tokenizers["chatml"].hf
    whole = hf(text, add_special_tokens=False)["input_ids"]
    ends = [hf.decode(whole[:count]) for count in range(len(whole) + 1)]
    for at in range(len(text) + 1):
        before, after = tokenizers["chatml"].encode_cut(text, at)
        assert before + after == whole
        complete = max(count for count, end in enumerate(ends) if text[:at].startswith(end))
        assert len(before) >= complete
        assert text[:at].startswith(ends[len(before)].rstrip())  # blanks after the cut may be the context's
        without = Tokenizer(WithoutOffsets(hf)).encode_cut(text, at)
        assert without[0] + without[1] == whole
        assert len(without[0]) <= len(before)


@pytest.mark.parametrize("files", [["tokenizer.model"], ["tokenizer.json", "tokenizer_config.json"]], ids=["sp", "hf"])
def test_a_long_text_is_tokenized_in_parts_and_cut_in_one_of_them(tmp_path, monkeypatch, files):
    for name in ["config.json", *files]:
        shutil.copy(DEMO / name, tmp_path / name)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config["chat_template"] = template("mistral")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    words = random.Random(0).choices("the Größe of\n 12 needles 你好 is, so on.".split(" "), k=500)
    for number in (10, 250, 490):
        document, question = " ".join(words[:number]).strip(), "What is it? " + " ".join(words[number:])
        messages = [user([part(f"{document} ", prompt_cache_breakpoint=True), part(question)])]
        monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", 2**16)
        whole = tokenizer._ids(f"<s>[INST] {document} {question} [/INST]")
        monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", 50)
        context, query = split_messages(tokenizer, messages)
        assert context + query == whole
        assert context[0] == 1
        assert tokenizer.decode(query).strip() == f"{question} [/INST]"
        assert tokenizer.decode(context).strip() == f"[INST] {document}"


def test_end_strings_name_special_tokens(tokenizers):
    tokenizer = tokenizers["llama3"]
    ids = tokenizer.encode_query("It is. Bye<|eot_id|>Not this")
    for end, text in [("<|eot_id|>", "It is. Bye"), (" Bye<|eot_id|>", "It is."), ("<|end_header_id|>", None)]:
        stream = TextStream(tokenizer, (end,))
        shown = ""
        for token in ids:
            shown += stream.push(token)
            if stream.ended:
                break
        assert stream.ended == (text is not None)
        assert shown + stream.finish() == stream.text == (text or "It is. ByeNot this")


def test_the_front_door_takes_messages(demo, tmp_path):
    folder = shutil.copytree(demo, tmp_path / "checkpoint")
    source = "{{ bos_token }}{{ greeting }}{{ messages | map(attribute='content') | join('\\n\\n') }}"
    (folder / "hf" / "chat_template.jinja").write_text(source)
    document = make_document(random.Random("chat"), filler_sentences=20, needles=2)
    key, value = next(iter(document.needles.items()))
    messages = [system(document.text), user(question(key))]
    with LLM(folder, attention={"block_size": 64}, chat_template_kwargs={"greeting": "Read. "}) as llm:
        context, query = llm.encode_messages(messages)
        assert llm.generate(context, [query], SamplingParams(max_tokens=10))[0].text == value
        whole = llm.tokenizer.hf.apply_chat_template(messages, return_dict=False, greeting="Read. ")
        assert whole[-len(query) :] == query
        assert context.tokens == len(whole) - len(query)
        with pytest.raises(ValueError, match="messages must be a list"):
            llm.encode_messages([])
