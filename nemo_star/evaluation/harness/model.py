"""`nemo_star`: this engine as a model of lm-evaluation-harness (`lm_eval.api.model.LM`), on rank 0 of a job."""

from __future__ import annotations

import atexit
import logging
from array import array
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Self, TypeVar

import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from nemo_star.evaluation.harness.arguments import llm_arguments, sampling
from nemo_star.evaluation.harness.prompts import Cut, Prompts
from nemo_star.evaluation.harness.ranks import Generate, Ranks, Work
from nemo_star.evaluation.harness.scoring import Score
from nemo_star.llm.front import LLM
from nemo_star.llm.opened import OpenedModel
from nemo_star.parallel.groups import on_first_rank

T = TypeVar("T")
_log = logging.getLogger(__name__)
_OPTIONS = ("query", "max_length", "add_bos_token")
"""Arguments of `NemoStar` beside the model."""


@register_model("nemo_star")
class NemoStar(TemplateLM):
    """Made on all ranks; the harness runs on rank 0, in `lead`, and sees one model (its `world_size` is 1).

    The query of a prompt is its last line (`query`): what stands before is the context, encoded once for all prompts
    that share it. A scored continuation is decoded after context and query, exactly. Conventions are those of the
    harness's `hf` model: how texts are tokenized, what is cut off on the left, what windows a text is rolled through.

    Args:
        llm: with its weights.
        query: `last_line` or `last_paragraph`.
        max_length: tokens of prompt and answer; None: as long as the model was trained for.
        add_bos_token: whether a text begins with the beginning-of-text token; None: as the tokenizer does.

    Raises:
        ValueError: on all ranks alike: a checkpoint without tokenizer, or which says nothing of its length.
    """

    def __init__(
        self,
        llm: OpenedModel,
        *,
        query: str = "last_line",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        self._llm = llm
        self._device = llm.device
        self._max_length = max_length or llm.description.model.max_position_embeddings
        if self._max_length is None:
            raise ValueError("the checkpoint does not say how long its texts may be: give max_length")
        self._prompts: Prompts | None = None
        on_first_rank(lambda: self._read(query, add_bos_token))
        self._ranks = Ranks(llm)

    def _read(self, query: str, add_bos: bool | None) -> None:
        if self._llm.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: lm-evaluation-harness asks in texts")
        self.tokenizer = self._llm.tokenizer.hf
        self._prompts = Prompts(self._llm.tokenizer, query=query, add_bos=add_bos)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From `model_args`: the keys of `LLM` as in a recipe (`attention=star`, `attention.block_size=2048`), and the
        options of this class.

        Under torchrun only rank 0 comes back from here. The other ranks work for it until its program ends, and exit.

        Args:
            additional_config: the harness's; batch_size is that of decode, device is not asked for.
        """
        batch_size = (additional_config or {}).get("batch_size")
        options = {name: arg_dict[name] for name in _OPTIONS if name in arg_dict}
        values = llm_arguments({name: value for name, value in arg_dict.items() if name not in _OPTIONS})
        if str(batch_size).isdigit():
            values["max_batch_size"] = int(str(batch_size))
        lm = cls(LLM(values.pop("checkpoint"), **values), **options)
        if not lm.leads:
            lm._ranks.follow()
            raise SystemExit(0)
        atexit.register(lm._end)
        return lm

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """The same from `key=value,key=value`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def leads(self) -> bool:
        """Whether this rank runs the harness."""
        return dist.get_rank() == 0

    def lead(self, evaluate: Callable[[], T]) -> T | None:
        """Run `evaluate` on rank 0, with the other ranks working for it; its result, there. This model's end.

        Raises:
            ValueError: on all ranks, what goes wrong on rank 0. There, the error itself.
        """
        if not self.leads:
            self._ranks.follow()
            return None
        try:
            with self._llm.watchdog.suspended("lm-evaluation-harness"):
                result = evaluate()
        except Exception as error:
            self._end(str(error) if isinstance(error, ValueError) else f"rank 0: {type(error).__name__}: {error}")
            raise
        self._end()
        return result

    def _end(self, error: str | None = None) -> None:
        """Unless a round has failed halfway: other ranks may wait elsewhere then, and the launcher ends them."""
        if self._ranks.is_between_rounds:
            self._ranks.end(error)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to (prompt, arguments of generation), in order; of the arguments, `arguments.sampling` takes all
        that it knows and refuses others.

        Raises:
            ValueError: a prompt or arguments that cannot be answered.
        """
        works: list[Work] = []
        lost: list[int] = []
        for number, request in enumerate(requests):
            prompt, arguments = request.args
            params = sampling(arguments, number, default_tokens=self.max_gen_toks)
            room = self.max_length - params.max_tokens
            if room < 1:
                raise ValueError(f"max_gen_toks={params.max_tokens} leaves nothing of max_length={self.max_length}")
            cut = self._texts.cut(prompt)
            lost.append(cut.tokens - room)
            cut = cut.shortened(room)
            works.append(Generate(array("i", cut.context), cut.query, params))
        self._warn_of_lost(lost)
        answers = [""] * len(requests)
        self._check([(work, work.params.max_tokens) for work in works if isinstance(work, Generate)])
        with tqdm(total=len(works), desc="Answers", disable=disable_tqdm) as bar:
            for place, text in self._ranks.done(works):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
                bar.update()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts (prompt,), each in windows of `max_length` tokens.

        All of a text is scored, so nothing of it is context but what a last window sees again: attention is exact.
        """
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            rolled = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            found = [(None, *utils.make_disjoint_window(window)) for window in rolled]
            windows += found
            counts.append(len(found))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of continuations, for the harness's own `loglikelihood`.

        Args:
            requests: the texts, or None, and the tokens of prompt and continuation.
        """
        works, places = self._by_prompt(requests)
        answers = [(0.0, False)] * len(requests)
        self._check([(work, max(map(len, work.continuations)) - 1) for work in works])
        with tqdm(total=len(requests), desc="Continuations", disable=disable_tqdm) as bar:
            for number, scored in self._ranks.done(works):
                for place, answer in zip(places[number], scored, strict=True):
                    answers[place] = answer
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                    bar.update()
        return answers

    def _by_prompt(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]]
    ) -> tuple[list[Score], list[list[int]]]:
        """Work for each prompt, and the places of its continuations in `requests`."""
        works: dict[tuple[bytes, bytes], Score] = {}
        places: dict[tuple[bytes, bytes], list[int]] = {}
        lengths: dict[str, int] = {}
        lost: list[int] = []
        for place, (texts, prompt, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with max_length={self.max_length}"
                )
            # The harness has moved the blanks at its end to the continuation.
            text = texts[0].rstrip() if texts is not None else ""
            if text not in lengths:
                lengths[text] = len(self._texts.cut(text).query) if text else 1
            # The last token of a continuation is predicted and not seen.
            room = self.max_length + 1 - len(continuation)
            at = len(prompt) - min(lengths[text], len(prompt))
            lost.append(len(prompt) - room)
            cut = Cut(prompt[:at], prompt[at:]).shortened(room)
            context, query = array("i", cut.context), cut.query
            key = context.tobytes(), array("i", query).tobytes()
            works.setdefault(key, Score(context, query)).continuations.append(continuation)
            places.setdefault(key, []).append(place)
        self._warn_of_lost(lost)
        return list(works.values()), list(places.values())

    def _warn_of_lost(self, tokens: list[int]) -> None:
        """How many each prompt has too many."""
        if too_long := [lost for lost in tokens if lost > 0]:
            _log.warning(
                "%d of %d prompts are too long for max_length=%d and lose their beginning, up to %d tokens",
                *(len(too_long), len(tokens), self.max_length, max(too_long)),
            )

    def _check(self, works: list[tuple[Generate | Score, int]]) -> None:
        """Refuse what cannot run; warn of the longest, with the tokens that come after its query."""
        sizes = [(len(work.context), len(work.query) + more) for work, more in works]
        for context, others in sizes:
            self._llm.check(context, others)
        for warning in self._llm.check(*max(sizes, key=sum)) if sizes else ():
            _log.warning("%s", warning)

    @property
    def _texts(self) -> Prompts:
        assert self._prompts is not None, "rank 0 has the tokenizer"
        return self._prompts

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer."""
        assert self._max_length is not None
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Generated where a task does not say how many; as the harness's `hf`."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text is scored after that comes after nothing: the beginning of text, else its end."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        return self._texts.encode(string, special=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text; without a generation prompt the last one goes on."""
        assert self._llm.tokenizer is not None
        end = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self._llm.tokenizer.render(chat_history, **end, **(self._llm.config.chat_template_kwargs or {}))

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness caches requests."""
        return str(self._llm.config.checkpoint).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """For the results: what computed them."""
        layout = self._llm.groups.layout
        return {
            "checkpoint": str(self._llm.config.checkpoint),
            "attention": asdict(self._llm.method.settings),
            "engine": self._llm.engine.describe(),
            "layout": {name: getattr(layout, name) for name in ("tp", "cp", "pp", "dp")},
        }
