"""The front door: a converted checkpoint that encodes contexts and answers questions about them.

    from nemo_star import LLM, SamplingParams

    llm = LLM("DIR", attention={"kind": "star", "block_size": 2048})
    book = llm.encode("Call me Ishmael. ...")
    results = llm.generate(book, ["Who tells the story?", "When?"], SamplingParams(max_tokens=32))

Under torchrun every rank runs the same script and gets the same results; plain python is one rank.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.checkpoint.verify import require_checksums, verify_checkpoint
from nemo_star.config.llm import LLMConfig
from nemo_star.config.sampling import SamplingParams
from nemo_star.config.strict import parse
from nemo_star.contexts.fingerprint import weights_fingerprint
from nemo_star.contexts.storage import load_context, save_context
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.build import build_engine, dtype_name
from nemo_star.engine.context import Sequence as SequenceOfTokens
from nemo_star.engine.engine import Engine, finished
from nemo_star.engine.scheduler import ContextWork, Question, Scheduler
from nemo_star.llm.book import Book
from nemo_star.llm.conversation import Conversation
from nemo_star.methods.registry import method_of
from nemo_star.models.sequence_parallel import check_sequence_parallel
from nemo_star.parallel.experts import check_experts
from nemo_star.parallel.groups import (
    create_groups,
    gather_objects,
    initialize,
    leave_groups,
    on_every_rank,
    on_first_rank,
)
from nemo_star.parallel.layout import check_layout, plan_layout
from nemo_star.planning.limit import MemoryLimit
from nemo_star.planning.work import Workload
from nemo_star.runtime.launch import environment_local_rank, environment_world_size
from nemo_star.runtime.memory import FreeMemory, free_memory
from nemo_star.runtime.watchdog import watchdog_of_this_job
from nemo_star.text.chat import split_messages
from nemo_star.text.completion import Completion, Result
from nemo_star.text.ids import Text, check_ids, check_text
from nemo_star.text.tokenizer import Tokenizer, end_token_ids

MAX_BATCH_SIZE = 16
"""Answers that decode together unless something else is said."""


class LLM:
    """A model on all ranks that were started, `tp * cp * pp` of them to a replica.

    Args:
        checkpoint: directory made by `nemo-star convert import`, or a Hugging Face directory, which is converted once
            into `cache_dir` (None: ~/.cache/nemo_star).
        dtype: float32, bfloat16 or float16, which the model computes in; None: float32 on CPU, bfloat16 on GPU.
        verify: compare the weight files with their checksums before loading, which reads them once more.
        attention, parallel, cache: a recipe's groups, with its keys; what is left out has the recipes' defaults.
        chat_template: wrap contexts and queries as the tokenizer's chat template says.
        chat_template_kwargs: variables of the template, such as {"enable_thinking": False}.
        max_batch_size: answers that decode together.

    Raises:
        ValueError: on all ranks alike: what does not fit together, by name, before weights are loaded.
    """

    config: LLMConfig
    engine: Engine
    max_batch_size = MAX_BATCH_SIZE

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str | None = None,
        attention: Mapping[str, Any] | None = None,
        parallel: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
        chat_template: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        verify: bool = False,
        cache_dir: str | Path | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
        self.max_batch_size = max_batch_size
        values = {
            "checkpoint": str(checkpoint),
            "verify": verify,
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "dtype": dtype,
            "chat_template": chat_template,
            "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
            "attention": attention or {},
            "parallel": parallel or {},
            "cache": cache or {},
        }
        self._open(parse(LLMConfig, values), free_memory)
        self.load_weights()
        atexit.register(leave_groups)
        # Between calls the caller works as long as it likes.
        self._exits.enter_context(self.watchdog.suspended("the caller's own work"))

    @classmethod
    def opened(cls, config: LLMConfig, free_memory: Callable[[torch.device], FreeMemory] = free_memory) -> Self:
        """An LLM whose weights are not loaded yet (`load_weights`): what can be checked without them is checked.

        Args:
            free_memory: what a rank's device has left; a context that certainly does not fit is refused.
        """
        llm = cls.__new__(cls)
        llm._open(config, free_memory)
        return llm

    def _open(self, config: LLMConfig, free: Callable[[torch.device], FreeMemory]) -> None:
        self.config = config
        self.method = method_of(config.attention)
        layout = plan_layout(config.parallel, self.method, world_size=environment_world_size())
        with ExitStack() as exits:
            self.watchdog = exits.enter_context(watchdog_of_this_job(config.parallel.timeout_minutes))
            self.device = initialize()
            check_sequence_parallel(config.parallel.sequence_parallel, layout, self.device.type)
            self.groups = create_groups(layout)
            self._read_checkpoint(Path(str(config.checkpoint)), free(self.device))
            self._exits = exits.pop_all()

    def _read_checkpoint(self, folder: Path, free: FreeMemory) -> None:
        """All of it but the weights."""
        self._place = locate_checkpoint(folder, self.config.cache_dir)
        self.description = on_first_rank(self._place.describe)
        if self.config.verify:
            require_checksums(self._place.converted, self.description)
        self.method = method_of(self.config.attention, windows=self.description.model.needs_windows)
        check_layout(self.description.model, self.groups.layout, self.method)
        divides_sequence = self.config.parallel.sequence_parallel
        check_experts(self.description.model, self.groups.layout, sequence_parallel=divides_sequence)
        work = Workload(
            self.description.model,
            self.groups.layout,
            self.method,
            context_tokens=0,
            dtype=dtype_name(self.config, self.device),
            cache_dtype=self.config.cache.dtype,
        )
        self._limit = MemoryLimit(work, gather_objects(free))
        self._limit.check(0)
        answers = self.is_first_of_replica
        texts = self._place.companions
        self.tokenizer = on_every_rank(lambda: Tokenizer.load(texts) if answers else None)
        self.end_ids = end_token_ids(texts, self.tokenizer) if answers else frozenset()

    def load_weights(self) -> None:
        """Build the model and load its weights: the expensive part."""
        with self.watchdog.suspended("loading the weights"):
            self._prepare_checkpoint()
            self.engine = build_engine(self.config, self.description, self.groups, self.device)
        self.watchdog.watch_layers(self.engine.stage.model.decoder.layers)

    def _prepare_checkpoint(self) -> None:
        """What has to be converted or verified is, by the ranks of each machine for themselves."""
        number, count = environment_local_rank()
        place = self._place
        if any(gather_objects(place.is_missing)):
            on_every_rank(lambda: place.convert() if number == 0 else None)
            self.description = on_first_rank(place.describe)
            if self.is_first_of_replica:  # of a model that also sees, the language model's
                self.end_ids = end_token_ids(place.companions, self.tokenizer)
        self.config = replace(self.config, checkpoint=str(place.converted))
        if self.config.verify:
            on_every_rank(lambda: verify_checkpoint(place.converted, self.description, share=(number, count)))

    def close(self) -> None:
        """End the watchdog; the process groups stay until the process ends."""
        self._exits.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank chooses tokens."""
        return self.groups.replica.rank() == 0

    def encode(self, context: Text, *, on_block: Callable[[], None] = lambda: None) -> Book:
        """Encode a context: text (BOS goes before it) or token ids, on all ranks of all replicas.

        Args:
            on_block: called after each of this rank's blocks.

        Raises:
            ValueError: an empty or unknown text or token, or a context that certainly does not fit.
        """
        with self.watchdog.resumed():
            ids = self._ids([("context", context)])[0]
            self.check(len(ids))
            return Book(self, self.engine.encode(ids, on_block=on_block))

    def append(self, book: Book, text: Text) -> None:
        """`Book.append`."""
        with self.watchdog.resumed():
            ids = self._ids([("appended text", text)])[0]
            self.check(book.tokens + len(ids))
            finished(self.engine.extend(book.encoded, ids))

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Book, list[int]]:
        """Encode the context of a conversation; with it the query's token ids, for `generate`.

        Args:
            messages: {"role", "content"}; `text/chat.py: split_messages` says where the context ends.

        Raises:
            ValueError: messages that the tokenizer's chat template does not take, or a context as in `encode`.
        """
        variables = self.config.chat_template_kwargs
        with self.watchdog.resumed():
            context, query = on_first_rank(
                lambda: split_messages(self.tokenizer, list(messages), template_kwargs=variables)
            )
        return self.encode(context), query

    def generate(
        self, context: Book, queries: Text | Sequence[Text], params: SamplingParams | None = None
    ) -> list[Result]:
        """Answer queries (text or token ids) about a context, which stays as it is; one result a query, in order.

        Queries decode together, as many as `max_batch_size`. Replicas divide them; every rank gets all results.

        Raises:
            ValueError: an empty or unknown text or token, or what the checkpoint's tokenizer would have to give.
        """
        params = params or SamplingParams()
        with self.watchdog.resumed():
            self.check_sampling(params)
            query_ids = self._ids([("query", query) for query in _several(queries)])
            self.check(context.tokens, max(map(len, query_ids), default=0) + params.max_tokens)
            return self._answer_all(context, query_ids, params)

    def converse(self, book: Book) -> Conversation:
        """A conversation about a book, in which each question sees the ones before it."""
        return Conversation(self, book)

    def ids_after(self, so_far: list[int], turns: Sequence[tuple[Text, str | None]], query: Text) -> list[int]:
        """Token ids of a conversation after its book, up to the next answer.

        Args:
            so_far: what has been said, in tokens.
            turns: the same, as (question, answer).
        """
        if self.config.chat_template and isinstance(query, str):
            said = [(question, answer or "") for question, answer in turns if isinstance(question, str)]
            if len(said) < len(turns):
                raise ValueError("a conversation by chat template takes all its questions as text")
            variables = self.config.chat_template_kwargs
            return on_first_rank(lambda: self._ids_of_turns([*said, (query, "")], variables))
        return [*so_far, *self._ids([("query", query)])[0]]

    def go_on(
        self,
        book: Book,
        sequence: SequenceOfTokens,
        run: list[int],
        params: SamplingParams,
        *,
        show: Callable[[str], None] = lambda text: None,
    ) -> Result:
        """The next turn of a `Conversation`, on every replica: run these tokens, then generate."""
        with self.watchdog.resumed():
            self.check_sampling(params)
            self.check(book.tokens, sequence.tokens + len(run) + params.max_tokens)
            shows = show if self.groups.dp.rank() == 0 else lambda text: None
            question = self.question(book.work(), run, params, sequence=sequence, show=shows)
            self.scheduler().answer(question)
            result = gather_objects(self.results(question)[0])[0]
        assert result is not None
        return result

    def scheduler(self, **options: Any) -> Scheduler:
        """A loop on this rank's replica."""
        return Scheduler(self.engine, **{"max_batch_size": self.max_batch_size, **options})

    def question(
        self,
        work: ContextWork,
        query_ids: list[int],
        params: SamplingParams,
        *,
        sequence: SequenceOfTokens | None = None,
        show: Callable[[str], None] = lambda text: None,
    ) -> Question:
        """A query for a scheduler; on the replica's first rank it has a `Completion` for each sample.

        Args:
            show: called there with text as it becomes final.
        """
        answers: list[Completion | None] = [None] * params.n
        if self.is_first_of_replica:
            answers = [
                Completion(params, params.seed + sample, self.tokenizer, end_ids=self.end_ids, show=show)
                for sample in range(params.n)
            ]
        return Question(work, query_ids, params.max_tokens, answers, sequence)

    def results(self, question: Question) -> list[Result | None]:
        """Of each sample of an answered question; None on ranks that did not choose."""
        return [answer.finish() if isinstance(answer, Completion) else None for answer in question.answers]

    def token_ids(self, name: str, text: Text) -> list[int]:
        """Token ids of a `context` or `query`, tokenized once for all ranks.

        Raises:
            ValueError: an empty or unknown text or token.
        """
        return self._ids([(name, text)])[0]

    def check(self, context_tokens: int, new_tokens: int = 0) -> list[str]:
        """Refuse sizes that cannot run; warnings of those that hardly make sense.

        Raises:
            ValueError: names the numbers.
        """
        self.method.sizes(context_tokens)
        self._limit.check(context_tokens)
        warnings = [warning] if (warning := self.method.warning(context_tokens)) else []
        last, model = context_tokens + new_tokens, self.description.model
        trained, exact = model.max_position_embeddings, model.max_exact_positions
        if exact is not None and last > exact:
            raise ValueError(
                f"context, query and answer take up to {last} positions; from position {exact} on this model attends "
                "in a way that is not implemented (dual chunk attention, or dynamic rope scaling): shorten them"
            )
        rope = model.rope_scaling
        if rope is not None and rope.rope_type == "longrope":
            short = rope.original_max_position_embeddings
            if context_tokens <= short < last:
                warnings.append(
                    f"the context's {context_tokens} tokens take longrope's factors for up to {short} positions, query "
                    f"and answer go on to {last} with them: answers may be poor"
                )
        if trained is not None and last > trained:
            warnings.append(
                f"context, query and answer take up to {last} positions, the model was trained for {trained}: "
                "answers may be poor"
            )
        return warnings

    def context_store(self) -> ContextStore:
        """A store of contexts on this rank's replica, with the budget and folder of the group `cache`."""
        cache = self.config.cache
        return ContextStore(
            self.engine,
            budget_bytes=self._limit.kv_budget if cache.budget_gib is None else int(cache.budget_gib * 2**30),
            fingerprint=self.fingerprint,
            folder=None if cache.folder is None else Path(cache.folder),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are."""
        return on_first_rank(lambda: weights_fingerprint(self.description, self._place.converted))

    def load(self, folder: str | Path, *, verify: bool = False) -> Book:
        """A book that was saved (`Book.save`), at whatever layout.

        Args:
            verify: compare checksums, which takes reading all of it once more.

        Raises:
            ValueError: on all ranks alike: nothing saved there, another model's, damaged files.
        """
        with self.watchdog.suspended("loading a context"):
            loaded = load_context(self.engine, Path(folder), fingerprint=self.fingerprint, verify=verify)
        return Book(self, loaded)

    def save(self, book: Book, folder: str | Path) -> None:
        """`Book.save`."""
        with self.watchdog.suspended("saving a context"):
            save_context(self.engine, book.encoded, Path(folder), fingerprint=self.fingerprint)

    def check_sampling(self, params: SamplingParams) -> None:
        """Refuse what needs text where there is no tokenizer, on all ranks."""
        on_first_rank(lambda: _check_stop(params, self.tokenizer))

    def _answer_all(self, book: Book, query_ids: list[list[int]], params: SamplingParams) -> list[Result]:
        replica, replicas = self.groups.dp.rank(), self.groups.dp.size()
        work, scheduler = book.work(), self.scheduler()
        mine = {}
        for number in range(replica, len(query_ids), replicas):
            mine[number] = self.question(work, query_ids[number], params)
            scheduler.add(mine[number])
        scheduler.run()
        found: dict[int, list[Result]] = {}
        for answers in gather_objects({number: self.results(question) for number, question in mine.items()}):
            for number, results in answers.items():
                if chosen := [result for result in results if result is not None]:
                    found[number] = chosen
        ordered = [tuple(found[number]) for number in range(len(query_ids))]
        return [replace(samples[0], samples=samples) for samples in ordered]

    def _ids_of_turns(self, turns: list[tuple[str, str]], variables: Mapping[str, Any] | None) -> list[int]:
        check_text("query", turns[-1][0], self.tokenizer)
        assert self.tokenizer is not None
        return self.tokenizer.encode_turns(turns, template_kwargs=variables)

    def _ids(self, texts: Sequence[tuple[str, Text]]) -> list[list[int]]:
        """Token ids of named texts, tokenized once for all ranks."""
        return on_first_rank(lambda: [self._ids_of(name, text) for name, text in texts])

    def _ids_of(self, name: str, text: Text) -> list[int]:
        if isinstance(text, str):
            check_text(name, text, self.tokenizer)
            assert self.tokenizer is not None
            if name == "appended text":
                return self.tokenizer.encode_query(text)
            encode = self.tokenizer.encode_context if name == "context" else self.tokenizer.encode_query
            config = self.config
            return encode(text, chat_template=config.chat_template, template_kwargs=config.chat_template_kwargs)
        ids = _plain(text)
        check_ids(name, ids, self.description.model.vocab_size)
        return ids


def _several(queries: Text | Sequence[Text]) -> list[Text]:
    """One query, text or token ids, is a list of one."""
    if isinstance(queries, str):
        return [queries]
    listed = _plain(queries)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _plain(ids: Any) -> list[Any]:
    """A list, also of a tensor or an array."""
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def _check_stop(params: SamplingParams, tokenizer: Tokenizer | None) -> None:
    if params.stop and tokenizer is None:
        raise ValueError("stop (inference.end_strings) needs text, and the checkpoint has no tokenizer")
