"""`POST /v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nemo_star.config.sampling import SamplingParams
from nemo_star.engine.sampling import TokenLogprobs
from nemo_star.server.body import read_json
from nemo_star.server.errors import ApiError
from nemo_star.server.events import Event, Progress, QueryScores, SampleEnded, Token
from nemo_star.server.jobs import ClientGoneError, Group
from nemo_star.server.names import NamedContext, progress_fields
from nemo_star.server.orders import Ask, Encode
from nemo_star.server.prompts import Prompt
from nemo_star.server.replies import ChatReply, Reply, TextReply, usage
from nemo_star.server.schemas import MAX_PROMPTS, ChatRequest, CompletionRequest, Generation, seed_of
from nemo_star.server.state import Service
from nemo_star.server.stream import END, SIGN_OF_LIFE, Stream, all_events, sse, told, watched

_MAX_TOKENS_OF_COMPLETION = 16
"""OpenAI's default."""
_CLIENT_GONE = 499


@dataclass
class _Asked:
    """A request, ready to run."""

    prompts: list[Prompt]
    params: SamplingParams
    reply: Reply
    context: NamedContext | None = None
    """What the prompts come after, where it has a name."""
    echoed: list[str] = field(default_factory=list)
    """Texts of the prompts, where they are wanted."""
    scores_prompt: bool = False
    prompt_alone: bool = False
    """No token is wanted."""


@dataclass
class _Choice:
    """As it grows."""

    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str = "length"


def routes(service: Service) -> APIRouter:
    """Both routes."""
    router = APIRouter()

    @router.post("/v1/chat/completions", **service.documented(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, ChatRequest, service.limits)
        return await _Completion(service, request, body).chat(body)

    @router.post("/v1/completions", **service.documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_json(request, CompletionRequest, service.limits)
        return await _Completion(service, request, body).text(body)

    return router


class _Completion:
    """One request."""

    def __init__(self, service: Service, request: Request, body: Generation) -> None:
        self._service = service
        self._request = request
        self._body = body
        self._owner: str = request.state.owner
        self._note: dict[str, Any] = request.state.note

    async def chat(self, body: ChatRequest) -> Response:
        self._begin()
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens say different things", param="max_tokens")
        named = self._named()
        ids = None if named is None else named.ids
        prompt = await self._service.tokenized(self._owner, self._service.prompts.chat, body, ids)
        most = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = self._params([prompt], most, self._service.config.inference.tokens_to_generate, logprobs)
        reply = ChatReply(self._service.model_name, self._service.prompts.token_text)
        return await self._answered(_Asked([prompt], params, reply, named))

    async def text(self, body: CompletionRequest) -> Response:
        self._begin()
        if (body.best_of or 1) not in (1, body.n or 1):
            raise ApiError(400, f"best_of={body.best_of} is not implemented beyond n", param="best_of")
        alone = body.max_tokens == 0
        if alone and not body.echo:
            raise ApiError(400, "max_tokens=0 makes sense with echo=true only", param="max_tokens")
        if body.echo and (body.context is not None or body.stream or (body.n or 1) > 1):
            raise ApiError(400, "echo does not go together with context, stream or n above 1", param="echo")
        named = self._named()
        ids = None if named is None else named.ids
        prompts = await self._service.tokenized(self._owner, self._prompts, body, ids)
        params = self._params(
            prompts, body.max_tokens or (1 if alone else None), _MAX_TOKENS_OF_COMPLETION, body.logprobs
        )
        reply = TextReply(self._service.model_name, self._service.prompts.token_text)
        asked = _Asked(prompts, params, reply, named, prompt_alone=alone)
        if body.echo:
            token_text = self._service.prompts.token_text
            asked.echoed = [
                given if isinstance(given, str) else "".join(map(token_text, given)) for given in _several(body.prompt)
            ]
            asked.scores_prompt = body.logprobs is not None
        return await self._answered(asked)

    def _prompts(self, body: CompletionRequest, context_ids: array[int] | None) -> list[Prompt]:
        prompts, given = self._service.prompts, _several(body.prompt)
        if not 1 <= len(given) <= MAX_PROMPTS:
            raise ApiError(400, f"{len(given)} prompts: give 1 to {MAX_PROMPTS}", param="prompt")
        if body.echo:
            return [prompts.whole(each) for each in given]
        return [
            prompts.text(each, context_ids)
            if isinstance(each, str)
            else prompts.ids(each, body.query_tokens, context_ids)
            for each in given
        ]

    def _begin(self) -> None:
        service, model = self._service, self._body.model
        service.jobs.check_open()
        if model is not None and model != service.model_name:
            raise ApiError(
                404,
                f"the model {model[:200]!r} does not exist; this service has {service.model_name!r}",
                code="model_not_found",
                param="model",
            )

    def _named(self) -> NamedContext | None:
        if self._body.context is None:
            return None
        return self._service.used(self._owner, self._body.context)

    def _params(
        self, prompts: list[Prompt], asked_for: int | None, default: int, logprobs: int | None
    ) -> SamplingParams:
        body, inference, limits = self._body, self._service.config.inference, self._service.limits
        most = limits.max_completion_tokens
        if asked_for is not None and asked_for > most:
            message = f"{asked_for} tokens are asked for; this service gives at most {most}"
            raise ApiError(400, message, param="max_tokens")
        tokens = asked_for or min(default, most)
        for prompt in prompts:
            tokens = self._service.check(prompt, tokens, samples=body.n or 1, may_shorten=asked_for is None)
        default_temperature = 0.0 if inference.greedy else inference.temperature
        return SamplingParams(
            max_tokens=tokens,
            temperature=default_temperature if body.temperature is None else body.temperature,
            top_k=inference.top_k if body.top_k is None else max(0, body.top_k),
            top_p=inference.top_p if body.top_p is None else body.top_p,
            seed=secrets.randbelow(2**31) if body.seed is None else seed_of(body.seed),
            stop=inference.end_strings if body.stop is None else tuple(body.stop),
            ignore_eos=body.ignore_eos or inference.ignore_eos,
            n=body.n or 1,
            logprobs=logprobs,
        )

    async def _answered(self, asked: _Asked) -> Response:
        service, params = self._service, asked.params
        if params.stop:
            service.check_stop(params)
        self._note |= {
            "context_tokens": sum(len(prompt.context_ids) for prompt in asked.prompts),
            "query_tokens": sum(len(prompt.query_ids) for prompt in asked.prompts),
        }
        service.metrics.query_tokens.inc(self._note["query_tokens"])
        orders = [self._order(prompt, asked) for prompt in asked.prompts]
        async with AsyncExitStack() as running:
            group = running.enter_context(service.jobs.running(self._owner, orders))
            if asked.context is not None:
                running.enter_context(asked.context.in_use())
            await running.enter_async_context(watched(self._request, group))
            if self._body.stream:
                return Stream(told(self._stream(asked, group)), running.pop_all())
            try:
                return JSONResponse(await self._whole(asked, group))
            except ClientGoneError:
                return Response(status_code=_CLIENT_GONE)

    def _order(self, prompt: Prompt, asked: _Asked) -> Callable[[int], Ask | Encode]:
        owner, params, scores = self._owner, asked.params, asked.scores_prompt
        return lambda job: Ask(job, owner, prompt.context_ids, prompt.query_ids, params, scores)

    async def _whole(self, asked: _Asked, group: Group) -> dict[str, Any]:
        n = asked.params.n
        choices = [_Choice() for _ in range(n * len(asked.prompts))]
        async for item in all_events(group):
            if item is not None:
                _gather(choices, item[0] * n, item[1], asked)
        self._noted(asked, group, [choice.text for choice in choices])
        for number, text in enumerate(asked.echoed):
            choices[number].text = text + choices[number].text
        wants = asked.params.logprobs is not None
        found = [(choice.text, choice.logprobs if wants else None, choice.reason) for choice in choices]
        return asked.reply.whole(found, {**self._usage(asked, group), "timings": group.jobs[0].timings})

    async def _stream(self, asked: _Asked, group: Group) -> AsyncIterator[str]:
        body, reply, n = self._body, asked.reply, asked.params.n
        texts = [""] * (n * len(asked.prompts))
        for index in range(len(texts)):
            if (head := reply.head(index)) is not None:
                yield sse(head)
        patience, sent = self._service.limits.keepalive_seconds, time.monotonic()
        async for item in all_events(group, patience=patience):
            pieces = [] if item is None else self._pieces(reply, texts, item[0] * n, item[1])
            # Events that nothing is sent for are no signs of life.
            if not pieces and (item is None or time.monotonic() - sent >= patience):
                pieces = [SIGN_OF_LIFE]
            for piece in pieces:
                yield piece
                sent = time.monotonic()
        self._noted(asked, group, texts)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield sse(reply.bare(**self._usage(asked, group), timings=group.jobs[0].timings))
        yield END

    def _pieces(self, reply: Reply, texts: list[str], first: int, event: Event) -> list[str]:
        """What is sent of an event of the job whose choices begin at `first`; their `texts` grow."""
        if isinstance(event, Progress):
            return [sse(reply.bare(prompt_progress=_progress(event)))] if self._body.return_progress else []
        if not isinstance(event, Token | SampleEnded):
            return []
        index, chunks = first + event.sample, []
        texts[index] += event.text
        logprobs = [event.logprobs] if isinstance(event, Token) and event.logprobs is not None else None
        if event.text or logprobs:
            chunks.append(reply.chunk(index, event.text, logprobs, None))
        if isinstance(event, SampleEnded):
            chunks.append(reply.chunk(index, "", None, event.finish_reason))
        return [sse(chunk) for chunk in chunks]

    def _usage(self, asked: _Asked, group: Group) -> dict[str, Any]:
        generated = 0 if asked.prompt_alone else group.generated_tokens
        return {"usage": usage(asked.prompts, generated, group.cached_tokens)}

    def _noted(self, asked: _Asked, group: Group, texts: list[str]) -> None:
        """For the log, and for the state of a context of an earlier process."""
        if asked.context is not None and asked.context.status == "stored":
            asked.context.status = "ready"
        self._note |= {"cached_tokens": group.cached_tokens, "completion_tokens": group.generated_tokens}
        self._note |= group.jobs[0].timings
        if self._service.limits.log_text:
            self._note |= {"query": self._service.prompts.text_of(asked.prompts[0].query_ids), "answers": texts}


def _gather(choices: list[_Choice], first: int, event: Event, asked: _Asked) -> None:
    """Add an event to the choices of its job, which begin at `first`."""
    if isinstance(event, Token) and not asked.prompt_alone:
        choice = choices[first + event.sample]
        choice.text += event.text
        if event.logprobs is not None:
            choice.logprobs.append(event.logprobs)
    elif isinstance(event, SampleEnded) and not asked.prompt_alone:
        choice = choices[first + event.sample]
        choice.text += event.text
        choice.reason = event.finish_reason
    elif isinstance(event, QueryScores):
        prompt = asked.prompts[first // asked.params.n]
        nothing_before = TokenLogprobs(prompt.query_ids[0], float("nan"), [])
        choices[first].logprobs = [nothing_before, *event.logprobs]


def _progress(progress: Progress) -> dict[str, Any]:
    """llama.cpp's fields, and those of a context."""
    done, count = progress.blocks
    fresh = progress.tokens - progress.found_tokens
    return {
        "total": progress.tokens,
        "cache": progress.found_tokens,
        "processed": progress.found_tokens + (fresh * done // count if count else fresh),
        "time_ms": int(progress.seconds * 1000),
        **progress_fields(progress),
    }


def _several(prompt: str | list[Any]) -> list[Any]:
    """One prompt, text or token ids, is a list of one."""
    return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
