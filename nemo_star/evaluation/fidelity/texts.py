"""Samples of plain text, and where in a context what is asked for stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_star.config.fidelity import FidelityConfig
from nemo_star.evaluation.samples import Asked
from nemo_star.text.tokenizer import Tokenizer


def pieces(config: FidelityConfig, tokenizer: Tokenizer) -> Iterator[Asked]:
    """Files cut into pieces of each length, one after the other: context, query, and the answer that follows in the
    text, as token ids.

    Raises:
        ValueError: a file that is no text, or shorter than a piece.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.hf.bos_token_id]
    for path in map(Path, config.texts):
        try:
            ids = tokenizer.encode_query(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"texts: {path} is no text in UTF-8: {error}") from None
        for length in config.lengths:
            size = length - len(bos)
            count = min(config.samples, len(ids) // size)
            if not count:
                raise ValueError(f"texts: {path} has {len(ids)} tokens, fewer than lengths={length}")
            for number in range(count):
                piece = ids[number * size : (number + 1) * size]
                query = size - config.query_tokens - config.answer_tokens
                answer = size - config.answer_tokens
                context = bos + piece[:query]
                yield Asked(
                    str(number),
                    path.name,
                    length,
                    context,
                    piece[query:answer],
                    [],
                    config.answer_tokens,
                    answer=piece[answer:],
                )


def place_of(sample: Asked, count_tokens: Callable[[str], int]) -> int | None:
    """Context tokens before what a sample asks for: its only output, where that stands in the context once; None: not
    known."""
    if not isinstance(sample.context, str) or len(sample.outputs) != 1 or sample.context.count(sample.outputs[0]) != 1:
        return None
    return count_tokens(sample.context[: sample.context.index(sample.outputs[0])])
