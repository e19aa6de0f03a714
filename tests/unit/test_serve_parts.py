"""Parts of the service by themselves: keys, names, bodies, errors, jobs and their deadlines, an answer that fails."""

import asyncio
import json
from array import array
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from nemo_star.config.sampling import SamplingParams
from nemo_star.config.serve import ServerConfig
from nemo_star.server import completions
from nemo_star.server.answer import StreamedAnswer
from nemo_star.server.auth import Keys
from nemo_star.server.body import read_json
from nemo_star.server.contexts import Contexts
from nemo_star.server.errors import ApiError
from nemo_star.server.events import Answered, Encoded, Failed, Progress, Token
from nemo_star.server.jobs import ClientGoneError, Jobs
from nemo_star.server.mail import Inbox
from nemo_star.server.metrics import Metrics
from nemo_star.server.names import Names
from nemo_star.server.orders import Cancel, Encode, Forget
from nemo_star.server.prompts import Prompt
from nemo_star.server.replies import TextReply
from nemo_star.server.schemas import ChatRequest, CompletionRequest, ContextRequest
from nemo_star.server.state import Service, Turns
from nemo_star.server.stream import END, SIGN_OF_LIFE

IDS = array("i", [1, 2, 3])
ENCODED = Encoded(3, 0, 0.0, 0.0)


def refusal(status, call):
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.status == status
    return str(caught.value)


def test_keys(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text("# a comment\n\n  first-key-of-many-characters  \nshort\n")
    keys = Keys(str(file))
    assert "a key of 5 characters" in capsys.readouterr().err
    owner = keys.owner("Bearer first-key-of-many-characters")
    assert owner == keys.owner("bearer  first-key-of-many-characters ")
    assert owner != keys.owner("Bearer short")
    for wrong in (None, "", "Bearer", "Bearer x", "Basic short", "short", "Bearer \udcff", "Bearer # a comment"):
        refusal(401, lambda wrong=wrong: keys.owner(wrong))
    assert Keys(None).owner(None) == Keys(None).owner("Bearer x") == ""
    for content, message in ((b"# none\n", "holds no key"), (b"two words\n", "key 1"), (b"\xff", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Keys(str(file))


def test_names_are_an_owners_own_and_found_again(tmp_path):
    names = Names(tmp_path)
    mine = names.add("me", "notes", IDS, 5.0)
    with pytest.raises(ValueError, match="notes"):
        names.add("me", "notes", IDS, None)
    with pytest.raises(ValueError, match=mine.id):  # a name that is another one's id
        names.add("me", mine.id, IDS, None)
    theirs = names.add("you", "notes", IDS, None)
    assert names.find("you", mine.id) is None
    assert [each.id for each in Names(tmp_path).of("me")] == [mine.id]
    found = Names(tmp_path).find("you", "notes")
    assert (found.id, found.ids, found.ttl_seconds, found.status) == (theirs.id, IDS, None, "stored")
    same = names.add("me", None, IDS, None)
    assert not names.remove(mine)  # another one has the same text
    assert names.remove(same)
    assert Names(tmp_path).of("me") == []


def test_a_context_does_not_expire_while_it_is_used():
    names = Names(None)
    context = names.add("me", "notes", IDS, 1.0)
    context.status = "ready"
    assert list(names.expired()) == []
    context.used -= 2
    with context.in_use():
        assert list(names.expired()) == []
    assert list(names.expired()) == []
    context.used -= 2
    assert list(names.expired()) == [context]


def test_a_name_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    names = Names(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_star.server.names.json.dumps", full)  # after the tokens, before the record
    with pytest.raises(OSError, match="No space"):
        names.add("me", "notes", IDS, None)
    assert names.find("me", "notes") is None
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_damaged_name_is_left_out_and_said(tmp_path, capsys):
    names = Names(tmp_path)
    for name in ("one", "two", "three"):
        names.add("me", name, IDS, None)
    records = sorted(tmp_path.rglob("*.json"))
    records[0].write_text("{")
    records[1].with_suffix(".ids").write_bytes(b"\0\0\0\0")
    assert len(Names(tmp_path).of("me")) == 1
    assert capsys.readouterr().err.count("cannot be read") == 2


def read(content, model, *, kind="application/json", limits=None, pieces=None):
    """`read_json` of a request that comes in these pieces; of none that follow it waits for ever."""
    pieces = [content] if pieces is None else pieces

    async def receive():
        if not pieces:
            await asyncio.Event().wait()
        body = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": (body != b"" and content is None) or bool(pieces)}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_json(Request(scope, receive), model, limits or ServerConfig()))


def test_bodies_are_told_where_they_are_wrong():
    good = {"messages": [{"role": "user", "content": "x"}]}
    assert (
        read(json.dumps(good).encode(), ChatRequest, kind="application/JSON; charset=utf-8").messages[0]["role"]
        == "user"
    )
    refusal(415, lambda: read(b"{}", ChatRequest, kind="text/plain"))
    wrong = [b"", b"[]", b"{", b"\xff", b'{"messages":[]}', b'{"messages":"x"}', b"[" * 100_000]
    wrong += [json.dumps({**good, "temperature": value}).encode() for value in (float("nan"), float("inf"), "1", -1)]
    wrong += [json.dumps({**good, "user": "\ud800"}).encode(), json.dumps({**good, "what": 1}).encode()]
    wrong += [json.dumps({**good, "n": value}).encode() for value in (0, 33, 1.5, True, "1", 10**400)]
    for content in wrong:
        refusal(400, lambda content=content: read(content, ChatRequest))
    message = refusal(400, lambda: read(json.dumps({**good, "n": "1", "what": 1}).encode(), ChatRequest))
    assert message == "n: Input should be a valid integer; what: unknown field"


def test_many_mistakes_are_no_many_errors():
    """Each would take hundreds of bytes for its two."""
    many = b",".join([b"{}"] * 10_000)
    message = refusal(400, lambda: read(b'{"prompt":[' + many + b"]}", CompletionRequest))
    assert len(message) < 1000
    message = refusal(400, lambda: read(b'{"tokens":[' + many + b"]}", ContextRequest))
    assert message == "tokens.0: Input should be a valid integer"
    keys = b",".join(b'"k%d":1' % number for number in range(2000))
    for content in (b"{%s}" % keys, b'{"metadata":{%s},"prompt":"x"}' % keys):
        assert "fields" in refusal(400, lambda content=content: read(content, CompletionRequest))


def test_bodies_have_a_size_and_a_time():
    limits = ServerConfig(max_body_mib=0.001, body_seconds=0.05)
    refusal(413, lambda: read(b"x" * 2000, ChatRequest, limits=limits))
    refusal(413, lambda: read(None, ChatRequest, limits=limits, pieces=[b"x" * 600, b"x" * 600, b"x"]))
    refusal(408, lambda: read(None, ChatRequest, limits=limits, pieces=[b"x"]))


class Orders(Inbox):
    """What the engine was told, by kind."""

    def kinds(self):
        return [type(order) for order in self.take(wait=False)]


def started(**limits):
    inbox = Orders()
    jobs = Jobs(ServerConfig(**limits), inbox, Metrics())
    jobs.bind()
    jobs.open()
    return jobs, inbox


def an_encode(job):
    return Encode(job, "me", IDS)


def test_jobs_that_are_left_are_cancelled_and_counted_no_more():
    async def run():
        jobs, inbox = started(max_waiting=3, max_requests_per_key=2)
        with jobs.running("me", [an_encode, an_encode]) as group:
            refusal(429, lambda: jobs.check_room("me", 1))
            jobs.check_room("you", 1)
            refusal(429, lambda: jobs.check_room("you", 2))
            jobs.deliver([(0, Answered())])
            assert await group.next() == (0, Answered())
        assert inbox.kinds() == [Encode, Encode, Cancel]
        assert len(jobs) == 0
        jobs.check_room("me", 2)
        jobs.close("the end")
        assert "the end" in refusal(503, lambda: jobs.check_room("me", 1))

    asyncio.run(run())


def test_a_deadline_ends_a_group_also_while_nobody_asks_for_its_events():
    async def run():
        jobs, _ = started(request_seconds=0.02)
        with jobs.running("me", [an_encode]) as group:
            with pytest.raises(ApiError) as late:
                await group.next()
            assert (late.value.status, late.value.headers["x-should-retry"]) == (504, "false")
            jobs.deliver([(0, ENCODED)])
            with pytest.raises(ApiError):  # now and always
                await group.next()
            group.end_with(ClientGoneError())
            with pytest.raises(ApiError):
                await group.next()

    asyncio.run(run())


def test_a_failed_job_ends_its_group_alone():
    async def run():
        jobs, inbox = started()
        with jobs.running("me", [an_encode]) as failing, jobs.running("me", [an_encode]) as other:
            jobs.deliver([(0, Failed("broken")), (0, Answered()), (1, ENCODED), (1, Answered())])
            with pytest.raises(ApiError, match="broken"):
                await failing.next()
            assert [await other.next(), await other.next()] == [(0, ENCODED), (0, Answered())]
            assert other.is_done
        assert inbox.kinds() == [Encode, Encode, Cancel]

    asyncio.run(run())


def contexts_of(jobs, **limits):
    async def tokenized(owner, make, text):
        await asyncio.sleep(0)
        return make(text)

    service = SimpleNamespace(
        jobs=jobs,
        names=Names(None),
        limits=ServerConfig(**limits),
        prompts=SimpleNamespace(context=lambda text: IDS),
        tokenized=tokenized,
        check_context=lambda tokens: None,
    )
    return Contexts(service), service


def test_a_context_that_is_deleted_is_cancelled_before_it_is_forgotten():
    """Else the engine encodes its last block in between, and keeps what nobody can name."""

    async def run():
        jobs, inbox = started()
        contexts, service = contexts_of(jobs)
        context = await contexts.create("me", ContextRequest(text="x", name="notes"))
        contexts.delete(context)
        assert inbox.kinds() == [Encode, Cancel, Forget]
        assert len(jobs) == 0
        assert service.names.find("me", "notes") is None
        await asyncio.sleep(0)  # its task comes to its end
        again = await contexts.create("me", ContextRequest(text="x", name="notes"))
        jobs.deliver([(1, ENCODED), (1, Answered())])
        while again.status != "ready":
            await asyncio.sleep(0)
        assert len(jobs) == 0
        assert (context.status, inbox.kinds()) == ("failed", [Encode])

    asyncio.run(run())


def test_owners_take_turns_however_many_each_has_waiting():
    async def run():
        turns, order = Turns(), []

        async def take(owner):
            async with turns.of(owner):
                order.append(owner)
                await asyncio.sleep(0)

        await asyncio.gather(*(take(owner) for owner in ["me"] * 6 + ["you"] * 2))
        assert order.count("me") == 6
        assert order.index("you") <= 2
        assert "you" in order[order.index("you") + 1 :][:2]

    asyncio.run(run())


def test_contexts_that_come_at_once_are_no_more_than_there_may_be():
    async def run():
        jobs, _ = started(max_requests_per_key=2)
        contexts, service = contexts_of(jobs, max_contexts_per_key=3)
        made = [contexts.create("me", ContextRequest(text=str(number))) for number in range(6)]
        done = await asyncio.gather(*made, return_exceptions=True)
        assert sorted(str(each.status) for each in done) == ["429"] * 4 + ["queued"] * 2
        jobs.deliver([(number, event) for number in range(2) for event in (ENCODED, Answered())])
        while len(jobs):
            await asyncio.sleep(0)
        made = [contexts.create("me", ContextRequest(text=str(number))) for number in range(2)]
        done = await asyncio.gather(*made, return_exceptions=True)
        assert sorted(str(each.status) for each in done) == ["429", "queued"]
        assert len(service.names.of("me")) == 3

    asyncio.run(run())


@pytest.mark.parametrize("breaks", ["making", "choosing", "finishing"])
def test_an_answer_that_fails_ends_alone(breaks):
    def broken(*_, **__):
        raise RuntimeError("no such token")

    completion = SimpleNamespace(choose=lambda logits: (7, True), finish=broken, last_logprobs=None)
    if breaks == "choosing":
        completion.choose = broken
    llm = SimpleNamespace(completion=broken if breaks == "making" else lambda *_, **__: completion)
    told = []
    answer = StreamedAnswer(llm, SamplingParams(), 0, told.append)
    assert answer.choose(None) == (0, True)
    assert told[-1] == Failed("choosing a token failed: RuntimeError: no such token")
    assert told[:-1] == ([Token(0, 7, "", None)] if breaks == "finishing" else [])


def test_answers_whose_own_tokens_cannot_fit_are_refused():
    model = SimpleNamespace(max_position_embeddings=None)
    llm = SimpleNamespace(
        description=SimpleNamespace(model=model), check=lambda tokens: [], max_own_tokens=lambda store: 100
    )
    config = SimpleNamespace(server=ServerConfig(model_name="m"), checkpoint="c")
    store = SimpleNamespace(check_size=lambda tokens: None)
    service = Service(config, llm, None, None, None, None, None, store)
    prompt = Prompt(array("i", [1] * 50), [2] * 20)
    assert service.check(prompt, 80, samples=1, may_shorten=False) == 80
    assert service.check(prompt, 30, samples=2, may_shorten=False) == 30
    refused = refusal(413, lambda: service.check(prompt, 31, samples=2, may_shorten=False))
    assert "2 answer(s) to a query of 20 tokens may come to 102 tokens, there is memory for 100" in refused


@pytest.mark.parametrize("asks", [False, True])
def test_events_that_nothing_is_sent_for_are_no_signs_of_life(monkeypatch, asks):
    """Blocks that are done every 0.4 s, of a client that does not ask for progress: a comment after each second."""
    clock = [0.0]

    async def events(group, *, patience):
        for done in range(1, 10):
            clock[0] += 0.4
            yield 0, Progress([(done, 9)], tokens=9, found_tokens=0, seconds=clock[0], seconds_left=None)

    monkeypatch.setattr(completions, "all_events", events)
    monkeypatch.setattr(completions.time, "monotonic", lambda: clock[0])
    service = SimpleNamespace(limits=ServerConfig(keepalive_seconds=1.0, log_text=False))
    request = SimpleNamespace(state=SimpleNamespace(owner="", note={}))
    body = CompletionRequest(prompt="x", return_progress=asks)
    job = SimpleNamespace(timings={})
    group = SimpleNamespace(cached_tokens=0, generated_tokens=0, jobs=[job])
    asked = completions._Asked([Prompt(array("i"), [1])], SamplingParams(), TextReply("m", str))

    async def told():
        return [event async for event in completions._Completion(service, request, body)._stream(asked, group)]

    sent = asyncio.run(told())
    assert sent[-1] == END
    assert sent.count(SIGN_OF_LIFE) == (0 if asks else 3)
    assert len(sent) == (10 if asks else 4)
