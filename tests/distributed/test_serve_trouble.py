"""A service whose ranks die, whose disk is full, which is told to end; and clients that go away, or come twice."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest
from serving import service
from trouble import events, is_error, is_error_body, is_quiet, wait_until

CHAT, CONTEXTS = "/v1/chat/completions", "/v1/contexts"
END = "[DONE]"
BLOCK = 128
LINE = "The weather of this day is like that of the day before it. "
LONG = LINE * 200


def settings(*more):
    return [f"attention.block_size={BLOCK}", "inference.ignore_eos=true", "server.max_completion_tokens=6000", *more]


def long_chat(text=LONG, **values):
    return {"messages": [{"role": "user", "content": f"{text}\n\nWhat is it?"}], "max_tokens": 4, **values}


def chat_on(name, **values):
    return {"messages": [{"role": "user", "content": "What is it?"}], "context": name, "max_tokens": 4, **values}


def post(server, path, body):
    return httpx.post(f"{server.address}{path}", json=body, timeout=120)


def context(server, name):
    """Once it is ready, or has failed."""

    def found():
        return httpx.get(f"{server.address}{CONTEXTS}/{name}").json()

    wait_until(lambda: found()["status"] in ("ready", "failed", "stored"), "the context")
    return found()


@contextmanager
def streams(server, count, **values):
    """Streams that are under way, answers and one that waits for its context; gives what becomes of them: their
    events, or None where the connection ended."""

    def follow(number):
        body = long_chat(f"{number} {LONG}", stream=True, **values)
        told = []
        with (
            suppress(httpx.TransportError),
            httpx.stream("POST", f"{server.address}{CHAT}", json=body, timeout=120) as got,
        ):
            told += [line.removeprefix("data: ") for line in got.iter_lines() if line.startswith("data: ")]
        return [event if event == END else json.loads(event) for event in told] or None

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(follow, number) for number in range(count)]
        wait_until(lambda: server.total("nemo_star_answers_live") >= count, "all streams under way")
        yield futures


def ranks(server):
    """Processes by rank; without a launcher there is one."""
    children = psutil.Process(server.process.pid).children()
    found = {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
    return found or {0: psutil.Process(server.process.pid)}


def check_ended(server, processes):
    """All of the job, with an error."""
    assert server.process.wait(60) != 0
    gone, alive = psutil.wait_procs(processes.values(), timeout=60)
    assert not alive


def check_told(futures):
    """Each stream ended with an error, as an event or by its connection."""
    for future in futures:
        told = future.result(120)
        assert told is None or is_error_body(told[-1]), told[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_death_all_end_and_the_next_service_finds_the_contexts(demo, tmp_path, victim):
    kept = settings(f"cache.folder={tmp_path / 'kept'}")
    with service(demo, *kept, processes=2) as server:
        for name in ("one", "other"):
            assert post(server, CONTEXTS, {"text": f"{name} {LONG}", "name": name}).status_code == 202
            assert context(server, name)["stored"] == "disk"
        answer = post(server, CHAT, chat_on("one")).json()
        processes = ranks(server)
        with streams(server, 3, max_tokens=3000, n=4, temperature=1.0) as under_way:
            processes[victim].kill()
            check_told(under_way)
        check_ended(server, processes)
        stderr = "".join(server.lines)
    assert f"rank      : {victim} (local_rank: {victim})\n  exitcode  : -9" in stderr.partition("Root Cause")[2]
    assert stderr.count('"event": "engine failed"') == (victim == 1)
    _check_restart(demo, tmp_path / "kept", kept, answer)


def _check_restart(demo, folder, kept, answer):
    """Names, K/V where they are there, tokens where not; then what takes too long."""
    saved = sorted(folder.glob("*/*/"), key=lambda place: place.stat().st_mtime)
    saved = [place for place in saved if place.parent.name != "names"]
    shutil.rmtree(saved[-1])  # the K/V of the other one
    with service(demo, *kept, "server.request_seconds=3", processes=2) as server:
        assert {each["name"] for each in httpx.get(f"{server.address}{CONTEXTS}").json()["data"]} == {"one", "other"}
        before = server.total("nemo_star_blocks_encoded_total")
        again = post(server, CHAT, chat_on("one")).json()
        assert again["choices"] == answer["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == context(server, "one")["tokens"]
        assert server.total("nemo_star_blocks_encoded_total") == before
        encoded = post(server, CHAT, chat_on("other"))
        assert encoded.status_code == 200
        assert server.total("nemo_star_blocks_encoded_total") > before
        _check_deadline(server)


def _check_deadline(server):
    too_long = {"max_tokens": 6000, "n": 32, "temperature": 1.0}
    late = post(server, CHAT, long_chat(LINE, **too_long))
    assert late.status_code == 504
    assert late.headers["x-should-retry"] == "false"
    assert is_error(late)
    with httpx.stream(
        "POST", f"{server.address}{CHAT}", json=long_chat(LINE, stream=True, **too_long), timeout=60
    ) as stream:
        assert stream.status_code == 200
        last = events(stream)[-1]
    assert is_error_body(last)
    assert last["error"]["code"] == "timeout"
    wait_until(lambda: is_quiet(server), "an empty queue")


def test_told_to_end_it_ends_what_is_under_way(demo, tmp_path):
    """Of one process: the disk is full, then not; then SIGTERM."""
    folder = tmp_path / "kept"
    with service(demo, *settings(f"cache.folder={folder}"), processes=1) as server:
        _check_full_disk(server)
        _check_repeated(server)
        assert post(server, CONTEXTS, {"text": LONG + "kept", "name": "kept"}).status_code == 202
        assert context(server, "kept")["stored"] == "disk"
        with streams(server, 2, max_tokens=600) as under_way:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: post(server, CHAT, long_chat(LINE)).status_code == 503, "no new requests")
            refused = post(server, CHAT, long_chat(LINE))
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            assert is_error(refused)
            assert httpx.get(f"{server.address}/health").status_code == 200
            assert httpx.get(f"{server.address}/ready").status_code == 503
            for future in under_way:
                assert future.result(120)[-1] == END
        assert server.process.wait(60) == 0
    names = [json.loads(file.read_text())["name"] for file in folder.glob("names/*/*.json")]
    assert sorted(names) == ["full", "kept"]
    saved = [place for place in folder.glob("*/*/") if place.parent.name != "names"]
    assert len(saved) >= 3  # those two, and those that were asked without a name


def _check_full_disk(server):
    process = psutil.Process(server.process.pid)
    _, most = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (100, most))
    refused = post(server, CONTEXTS, {"text": LONG, "name": "refused"})
    assert refused.status_code == 507
    assert is_error(refused)
    process.rlimit(psutil.RLIMIT_FSIZE, (2**16, most))
    assert post(server, CONTEXTS, {"text": LONG, "name": "full"}).status_code == 202
    full = context(server, "full")
    assert (full["status"], full["stored"]) == ("ready", "memory")
    assert "cannot be kept" in full["warning"]
    answer = post(server, CHAT, chat_on("full"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == full["tokens"]
    process.rlimit(psutil.RLIMIT_FSIZE, (most, most))


def _check_repeated(server):
    """Whoever goes away during prefill and comes again finds what was encoded; who asks the same meanwhile joins."""

    def blocks():
        return server.total("nemo_star_blocks_encoded_total")

    body = long_chat("Again. " + LINE * 350, stream=True, return_progress=True, stream_options={"include_usage": True})
    before = blocks()
    with httpx.stream("POST", f"{server.address}{CHAT}", json=body, timeout=120) as stream:
        next(line for line in stream.iter_lines() if "prompt_progress" in line)
    wait_until(lambda: is_quiet(server), "an empty queue")
    first = blocks() - before
    with ThreadPoolExecutor(3) as pool:

        def ask(_):
            with httpx.stream("POST", f"{server.address}{CHAT}", json=body, timeout=120) as stream:
                return events(stream)

        told = list(pool.map(ask, range(3)))
    progress = [event["prompt_progress"] for event in told[0] if "prompt_progress" in event]
    whole = -(-progress[0]["total"] // BLOCK)
    assert 0 < first < whole
    assert blocks() - before == whole
    cached = sorted(each[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] for each in told)
    assert cached[1:] == [progress[0]["total"]] * 2


@pytest.mark.slow
def test_a_rank_that_stands_still_is_noticed(demo):
    """torchrun gives it 30 seconds to end by itself."""
    with service(demo, *settings("parallel.timeout_minutes=0.05"), processes=2) as server:
        processes = ranks(server)
        with streams(server, 2, max_tokens=3000, n=4, temperature=1.0) as under_way:
            processes[1].suspend()
            check_told(under_way)
        check_ended(server, processes)
        assert "".join(server.lines).count("no rank has made a step for 0.05 minutes (parallel.timeout_minutes)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_signals(demo, number, count, processes):
    """The first one lets streams end, and what does not end in time gets an error; the second one ends at once."""
    with service(demo, *settings("server.drain_seconds=2"), processes=processes) as server:
        all_ranks = ranks(server)
        with streams(server, 2, max_tokens=3000, n=8, temperature=1.0) as under_way:
            all_ranks[0].send_signal(number)
            wait_until(lambda: any('"draining"' in line for line in server.lines), "the first signal")
            if count == 2:
                all_ranks[0].send_signal(number)
            check_told(under_way)
        code = server.process.wait(60)
        expected = {(1, 1): 0, (1, 2): 130, (2, 1): 0, (2, 2): 1}[processes, count]
        assert code == expected
        gone, alive = psutil.wait_procs(all_ranks.values(), timeout=60)
        assert not alive


@pytest.mark.slow
def test_a_full_disk_on_two_ranks(demo, tmp_path):
    """The one that has no room says so for both."""
    with service(demo, *settings(f"cache.folder={tmp_path}"), processes=2) as server:
        ranks(server)[1].rlimit(psutil.RLIMIT_FSIZE, (2**16, psutil.RLIM_INFINITY))
        assert post(server, CONTEXTS, {"text": LONG, "name": "full"}).status_code == 202
        full = context(server, "full")
        assert (full["status"], full["stored"]) == ("ready", "memory")
        assert "cannot be kept" in full["warning"]
        assert (
            post(server, CHAT, chat_on("full")).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            == full["tokens"]
        )
    assert not list(tmp_path.glob("*/.aside-*"))
