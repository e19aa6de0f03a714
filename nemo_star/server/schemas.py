"""Bodies of requests, as OpenAI's API has them, and the fields that long contexts add.

An unknown field is refused: a setting that is silently ignored would be a wrong answer. Fields that change nothing here
(`user`, `store`, ...) are taken; those that would, and are not implemented, are taken only with the value that changes
nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nemo_star.config.sampling import MAX_SEED, MIN_TEMPERATURE

NOT_IMPLEMENTED = frozenset(
    "frequency_penalty presence_penalty logit_bias response_format modalities tools tool_choice suffix best_of".split()
)
"""Fields of OpenAI's that are taken only with the value that changes nothing."""
MAX_SAMPLES = 32
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 20
MAX_PROMPTS = 128
MAX_NAME_CHARACTERS = 200


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _temperature(value: Any) -> Any:
    """Next to nothing is the likeliest token, which other servers do as well."""
    return 0.0 if isinstance(value, float) and 0 < value < MIN_TEMPERATURE else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""The first wrong one is the only one told: errors take hundreds of times the memory of the body that they are in."""


class Body(BaseModel):
    """Strict: a number is no text, a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Body):
    type: Literal["text"]


class Generation(Body):
    """What both kinds of completion take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, BeforeValidator(_temperature), Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool = False

    # What long contexts add
    context: Name | None = None
    """Name or id of a context (`POST /v1/contexts`) that the prompt, or the messages, come after."""
    return_progress: bool = False
    """In a stream: events that say how far the context has been encoded."""

    # Taken, and without effect here
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    # Not implemented
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    """{"role", "content"}. The user's last message is the query, and what comes before it the context, unless a part
    with "prompt_cache_breakpoint": true ends the context, or `context` names one."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False

    # Not implemented
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    """Text or token ids, or several. The last paragraph of a text is the query, what comes before it the context; of
    token ids the last `query_tokens` are. With `context` all of it is the query."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 with `echo`: the prompt alone is scored."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    """Give the prompt, and with `logprobs` its tokens', too; of prompts that are no longer than a query may be."""
    query_tokens: Annotated[int, Field(ge=1)] | None = None

    # Not implemented
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None


class ContextRequest(Body):
    """`POST /v1/contexts`: one of `text` and `tokens`, or a form with a `file`."""

    text: Annotated[str, Field(min_length=1)] | None = None
    tokens: Annotated[TokenIds, Field(min_length=1)] | None = None
    name: Name | None = None
    """To call it by; the id is always good, too."""
    ttl_seconds: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """It is deleted when nobody has used it for so long."""


def seed_of(value: int) -> int:
    """A seed of any sign within the sampler's range."""
    return value % (MAX_SEED // 2)
