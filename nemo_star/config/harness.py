"""Keys of `nemo-star harness`, with lm-evaluation-harness's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nemo_star.config.llm import LLMConfig


@dataclass(frozen=True)
class HarnessConfig(LLMConfig):
    """All keys of `nemo-star harness`."""

    tasks: tuple[str, ...] = ()
    """Tasks and groups of lm-evaluation-harness, and those of include_path; * stands for any letters."""
    include_path: str | None = None
    """Folder with further tasks (YAML)."""
    include_defaults: bool = True
    """Whether the harness's own tasks are known, too: reading their names takes seconds."""
    num_fewshot: int | None = None
    """Examples before each question; None: as the task says."""
    limit: int | float | None = None
    """Documents of each task; below 1: a share of them; None: all."""
    gen_kwargs: dict[str, Any] | None = None
    """In place of what tasks say of generation, such as {max_gen_toks: 64}."""
    metadata: dict[str, Any] | None = None
    """For tasks that make their documents: RULER's take {max_seq_lengths: [4096,8192]}. `tokenizer` is the
    checkpoint's unless it is given here."""
    fewshot_as_multiturn: bool = True
    """With chat_template, examples are earlier turns, not part of the user's message."""
    system_instruction: str | None = None
    """Stands before each prompt; with chat_template it is the system's message."""
    query: Literal["last_line", "last_paragraph"] = "last_line"
    """What of a prompt is the query, which sees all of the context. A prompt without a line before that is query as a
    whole: attention is exact."""
    max_length: int | None = None
    """Tokens of prompt and answer; what is longer loses its beginning. None: as long as the model was trained for."""
    add_bos_token: bool | None = None
    """Whether a prompt begins with the beginning-of-text token; None: as the tokenizer does by itself."""
    max_batch_size: int = 16
    """Answers that decode together."""
    use_cache: str | None = None
    """File, to which the harness adds _rank0.db, for answers, which are found there by a later run."""
    log_samples: bool = True
    """Write down each document with its answer, too, where there is an output."""
    output: str | None = None
    """Folder for the harness's files: results and samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks is empty: give tasks=[NAME,...] of lm-evaluation-harness")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit={self.limit} must be above 0")
        for name in ("max_length", "max_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.include_defaults and self.include_path is None:
            raise ValueError("include_defaults=false leaves no tasks: give include_path=FOLDER")
