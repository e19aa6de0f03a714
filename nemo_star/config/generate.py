"""Keys of `nemo-star generate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_star.config.llm import LLMConfig
from nemo_star.config.sampling import MIN_TEMPERATURE, SamplingParams, check_choice


@dataclass(frozen=True)
class InferenceConfig:
    """How tokens are chosen and when generation ends (NeMo's names)."""

    tokens_to_generate: int = 128
    """No answer is longer."""
    greedy: bool = True
    """Take the likeliest token at every step; false: sample."""
    temperature: float = 1.0
    """Divides the logits before a token is sampled: below 1, likely tokens become likelier."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least top_p; 1 keeps all."""
    seed: int = 1234
    """A request is sampled with seed + its line index, so its answer does not depend on its neighbours."""
    end_strings: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it; a special token's text stands for the token."""
    ignore_eos: bool = False
    """Generate on after the model's end token, up to tokens_to_generate."""
    max_batch_size: int = 16
    """Answers that decode together."""
    steps_per_block: int = 1
    """Tokens that answers under way get between two blocks of a context that is being encoded."""

    def __post_init__(self) -> None:
        if self.tokens_to_generate < 1:
            raise ValueError(f"inference.tokens_to_generate={self.tokens_to_generate} must be at least 1")
        for name in ("max_batch_size", "steps_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"inference.{name}={getattr(self, name)} must be at least 1")
        if not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"inference.temperature={self.temperature} must be {MIN_TEMPERATURE} or more; "
                "for the likeliest token at every step: inference.greedy=true"
            )
        check_choice("inference.", top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        if "" in self.end_strings:
            raise ValueError("inference.end_strings holds an empty string, which would end every answer at once")

    def sampling(self, index: int) -> SamplingParams:
        """The same for the request of line `index`, in the words of the Python interface."""
        return SamplingParams(
            max_tokens=self.tokens_to_generate,
            temperature=0.0 if self.greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed + index,
            stop=self.end_strings,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True)
class DebugConfig:
    """For whoever looks for a wrong logit."""

    dump: str | None = None
    """New folder for each layer's output in the first request; nemo-star compare-dumps compares two of them."""


@dataclass(frozen=True)
class GenerateConfig(LLMConfig):
    """All keys of `nemo-star generate`; the recipes in `recipes/` set them."""

    context: str | None = None
    """One question: the long text that it is about."""
    context_file: str | None = None
    """A file with the context instead; - is standard input."""
    query: str | None = None
    """One question: what is asked. The answer is streamed to standard output."""
    query_file: str | None = None
    """A file with the query instead; - is standard input."""
    input: str | None = None
    """Many questions instead: a file of JSON lines {"id", "context" | "context_ids", "query" | "query_ids"}, or {"id",
    "messages"}, which the tokenizer's chat template makes one text of."""
    output: str | None = None
    """File of JSON lines, one for each line of `input` in the same order; an existing one is refused unless resumed or
    overwritten."""
    interactive: bool = False
    """A conversation about one context instead: questions from standard input (tools/chat.py)."""
    resume: bool = False
    """Continue `output` where an earlier run ended."""
    overwrite: bool = False
    """Replace output files that exist."""
    output_logits: str | None = None
    """Safetensors file of logits: <id>/logits [new_tokens, vocab] float32."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input is not None:
            single = [
                name for name in ("context", "context_file", "query", "query_file") if getattr(self, name) is not None
            ]
            if single:
                raise ValueError(f"input={self.input} goes without {', '.join(single)}: one JSONL file or one question")
        else:
            self._check_single("context")
            if not self.interactive:
                self._check_single("query")
            if self.context_file == "-" and self.query_file == "-":
                raise ValueError("context_file=- and query_file=- cannot both be read from standard input")
        self._check_output()
        if self.interactive:
            self._check_interactive()
        if self.debug.dump is not None and self.parallel.sequence_parallel:
            raise ValueError("debug.dump needs whole hidden states: parallel.sequence_parallel=false")
        if self.debug.dump is not None and self.decode.cuda_graph:
            raise ValueError(
                "debug.dump reads each layer's output, which a CUDA graph does not show: decode.cuda_graph=false"
            )

    def _check_interactive(self) -> None:
        beside = ("query", "query_file", "input", "output", "output_logits")
        if given := [name for name in beside if getattr(self, name) is not None]:
            raise ValueError(f"interactive=true takes questions as they are typed: without {', '.join(given)}")
        if self.context_file == "-":
            raise ValueError(
                "interactive=true reads questions from standard input: context_file=- cannot be read there"
            )

    def _check_single(self, name: str) -> None:
        text, file = getattr(self, name), getattr(self, f"{name}_file")
        if text is not None and file is not None:
            raise ValueError(f"{name} and {name}_file are both set: give one of them")
        if text is None and file is None:
            raise ValueError(
                f"no {name}: give {name}=TEXT or {name}_file=PATH (- is standard input), or input=FILE.jsonl"
            )

    def _check_output(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume=true and overwrite=true contradict each other")
        if self.resume and (self.output is None or self.input is None):
            raise ValueError("resume=true continues an output file: give input=FILE.jsonl and output=FILE.jsonl")
        if self.resume and self.output_logits is not None:
            raise ValueError(
                "resume=true and output_logits do not go together: the logits of earlier requests are gone"
            )
