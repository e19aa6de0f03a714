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
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_star.config.llm import LLMConfig
from nemo_star.config.sampling import SamplingParams
from nemo_star.config.strict import parse
from nemo_star.contexts.storage import load_context, save_context
from nemo_star.engine.context import Sequence as SequenceOfTokens
from nemo_star.engine.engine import finished
from nemo_star.llm.book import Book
from nemo_star.llm.conversation import Conversation
from nemo_star.llm.opened import MAX_BATCH_SIZE, OpenedModel, plain
from nemo_star.parallel.groups import gather_objects, leave_groups, on_first_rank
from nemo_star.runtime.memory import free_memory
from nemo_star.text.chat import split_messages
from nemo_star.text.completion import Result
from nemo_star.text.ids import Text, check_text


class LLM(OpenedModel):
    """A model on all ranks that were started, `tp * cp * pp` of them to a replica.

    Args:
        checkpoint: directory made by `nemo-star convert import`, or a Hugging Face directory, which is converted once
            into `cache_dir` (None: ~/.cache/nemo_star).
        dtype: float32, bfloat16 or float16, which the model computes in; None: float32 on CPU, bfloat16 on GPU.
        verify: compare the weight files with their checksums before loading, which reads them once more.
        attention, parallel, cache, decode: a recipe's groups, with its keys; what is left out has their defaults.
        chat_template: wrap contexts and queries as the tokenizer's chat template says.
        chat_template_kwargs: variables of the template, such as {"enable_thinking": False}.
        max_batch_size: answers that decode together.

    Raises:
        ValueError: on all ranks alike: what does not fit together, by name, before weights are loaded.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str | None = None,
        attention: Mapping[str, Any] | None = None,
        parallel: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
        decode: Mapping[str, Any] | None = None,
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
            "decode": decode or {},
        }
        self._open(parse(LLMConfig, values), free_memory)
        self.load_weights()
        atexit.register(leave_groups)
        # Between calls the caller works as long as it likes.
        self._exits.enter_context(self.watchdog.suspended("the caller's own work"))

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


def _several(queries: Text | Sequence[Text]) -> list[Text]:
    """One query, text or token ids, is a list of one."""
    if isinstance(queries, str):
        return [queries]
    listed = plain(queries)
    return [listed] if listed and isinstance(listed[0], int) else listed
