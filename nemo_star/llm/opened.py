"""A converted checkpoint on the ranks of this job, opened, checked, loaded: what front door and tools stand on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch

from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.checkpoint.verify import require_checksums, verify_checkpoint
from nemo_star.config.llm import LLMConfig
from nemo_star.config.sampling import SamplingParams
from nemo_star.contexts.fingerprint import weights_fingerprint
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.build import build_engine, dtype_name
from nemo_star.engine.context import Sequence as SequenceOfTokens
from nemo_star.engine.engine import Engine
from nemo_star.engine.graphs import check_graphs
from nemo_star.engine.scheduler import ContextWork, Question, Scheduler
from nemo_star.kernels.stored import stored_type
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of
from nemo_star.models.sequence_parallel import check_sequence_parallel
from nemo_star.models.torch_linears import check_torch_linears
from nemo_star.parallel.experts import check_experts
from nemo_star.parallel.groups import create_groups, gather_objects, initialize, on_every_rank, on_first_rank
from nemo_star.parallel.layout import check_layout, plan_layout
from nemo_star.planning.limit import MemoryLimit
from nemo_star.planning.work import Workload
from nemo_star.runtime.launch import environment_local_rank, environment_world_size
from nemo_star.runtime.memory import FreeMemory, free_memory
from nemo_star.runtime.watchdog import watchdog_of_this_job
from nemo_star.text.completion import Completion, Result
from nemo_star.text.ids import Text, check_ids, check_text
from nemo_star.text.tokenizer import Tokenizer, end_token_ids

MAX_BATCH_SIZE = 16
"""Answers that decode together unless something else is said."""


class OpenedModel:
    """Layout, process groups, checkpoint, engine; made by `opened`, or as an `LLM`."""

    config: LLMConfig
    engine: Engine
    max_batch_size = MAX_BATCH_SIZE

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
        if config.cache.dtype is not None:
            stored_type(config.cache.dtype)
        layout = plan_layout(config.parallel, self.method, world_size=environment_world_size())
        with ExitStack() as exits:
            self.watchdog = exits.enter_context(watchdog_of_this_job(config.parallel.timeout_minutes))
            self.device = initialize()
            check_sequence_parallel(config.parallel.sequence_parallel, layout, self.device.type)
            if config.decode.torch_linears:
                check_torch_linears(self.device, self._dtype)
            self.groups = create_groups(layout, cp_max_ctas=config.parallel.context_parallel_max_ctas)
            self._read_checkpoint(Path(str(config.checkpoint)), free(self.device))
            self._exits = exits.pop_all()

    @property
    def _dtype(self) -> torch.dtype:
        return cast("torch.dtype", getattr(torch, dtype_name(self.config, self.device)))

    def _read_checkpoint(self, folder: Path, free: FreeMemory) -> None:
        """All of it but the weights."""
        self._place = locate_checkpoint(folder, self.config.cache_dir)
        self.description = on_first_rank(self._place.describe)
        if self.config.verify:
            require_checksums(self._place.converted, self.description)
        self.method = method_of(self.config.attention, windows=self.description.model.needs_windows)
        check_layout(self.description.model, self.groups.layout, self.method)
        if self.config.decode.cuda_graph:
            check_graphs(self.description.model, self.groups.layout, self.device, self._dtype)
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
        self.watchdog.watch_layers(self.engine.stage.model.decoder.layers, self.device)
        if self.engine.graphs is not None:
            self.engine.graphs.on_step = lambda: self.watchdog.passed("a decode step", self.device)

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
            answers = [self.completion(params, sample, show=show) for sample in range(params.n)]
        return Question(work, query_ids, params.max_tokens, answers, sequence=sequence)

    def completion(
        self, params: SamplingParams, sample: int, *, show: Callable[[str], None] = lambda text: None
    ) -> Completion:
        """One sample of an answer, on the replica's first rank."""
        return Completion(params, params.seed + sample, self.tokenizer, end_ids=self.end_ids, show=show)

    def results(self, question: Question) -> list[Result | None]:
        """Of each sample of an answered question; None on ranks that did not choose."""
        return [answer.finish() if isinstance(answer, Completion) else None for answer in question.answers]

    def token_ids(self, name: str, text: Text) -> list[int]:
        """Token ids of a `context` or `query`, tokenized once for all ranks.

        Raises:
            ValueError: an empty or unknown text or token.
        """
        return self._ids([(name, text)])[0]

    def ids_on_replica(self, texts: Sequence[tuple[str, Text]]) -> list[list[int]]:
        """The same of several, tokenized by this rank's replica for itself."""
        return on_first_rank(lambda: [self._ids_of(name, text) for name, text in texts], self.groups.replica)

    def attend_by(self, attention: AttentionConfig) -> None:
        """Encode contexts by the same method with other sizes from now on.

        Raises:
            ValueError: it is another method, which takes other layers.
        """
        if attention.kind != self.config.attention.kind:
            raise ValueError(f"this model was loaded for attention={self.config.attention.kind}, not {attention.kind}")
        self.method = method_of(attention, windows=self.description.model.needs_windows)
        self.engine.method = self.method

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

    def max_own_tokens(self, store: ContextStore) -> int:
        """Of queries and answers under way at the same time, by what their K/V may take."""
        return self._limit.own_kv_budget // store.token_bytes

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are."""
        return on_first_rank(lambda: weights_fingerprint(self.description, self._place.converted))

    def check_sampling(self, params: SamplingParams) -> None:
        """Refuse what needs text where there is no tokenizer, on all ranks."""
        on_first_rank(lambda: _check_stop(params, self.tokenizer))

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
        ids = plain(text)
        check_ids(name, ids, self.description.model.vocab_size)
        return ids


def plain(ids: Any) -> list[Any]:
    """A list, also of a tensor or an array."""
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def _check_stop(params: SamplingParams, tokenizer: Tokenizer | None) -> None:
    if params.stop and tokenizer is None:
        raise ValueError("stop (inference.end_strings) needs text, and the checkpoint has no tokenizer")
