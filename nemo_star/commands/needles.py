"""Make needle-in-a-haystack questions for `nemo-star generate`, and score its answers.

    %(prog)s make --tokenizer DIR --tokens 8000 --needles 4 --documents 50 > questions.jsonl
    %(prog)s score answers.jsonl

Documents and questions have RULER's wording (arXiv 2404.06654); an answer is right when it is the needle's value.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_star.commands.arguments import parser

if TYPE_CHECKING:
    from nemo_star.text.tokenizer import Tokenizer


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("needles", __doc__)
    actions = command.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="questions as JSON lines on standard output")
    making.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer files")
    making.add_argument("--tokens", type=int, required=True, help="a context has at most so many tokens")
    making.add_argument("--needles", type=int, default=1, help="needles in a document, one of them asked for")
    making.add_argument("--documents", type=int, default=50)
    making.add_argument("--seed", type=int, default=0)
    scoring = actions.add_parser("score", help="share of right answers in a file of nemo-star generate")
    scoring.add_argument("answers", type=Path)
    return command.parse_args(arguments)


def make_row(tokenizer: Tokenizer, tokens: int, needles: int, seed: str) -> dict[str, Any]:
    """One question about a document that is as long as `tokens` allows."""
    from nemo_star.evaluation.needles import fit_document, question

    rng = random.Random(seed)
    document = fit_document(
        rng, tokens=tokens - 1, needles=needles, count_tokens=lambda text: len(tokenizer.encode_query(text))
    )
    key = rng.choice(list(document.needles))
    return {"context": document.text, "query": question(key), "outputs": [document.needles[key]]}


def score(file: Path) -> str:
    """How many answers of a file are right."""
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    if not answers:
        raise ValueError(f"{file} holds no answers")
    right = sum(answer.get("text", "").strip() in answer["outputs"] for answer in answers)
    return f"{right} of {len(answers)} right ({right / len(answers):.1%})"


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    given = parse_arguments(arguments)
    if given.action == "score":
        print(score(given.answers))
        return 0
    from nemo_star.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(given.tokenizer)
    if tokenizer is None:
        raise ValueError(f"--tokenizer {given.tokenizer} holds no tokenizer files")
    for number in range(given.documents):
        seed = f"needles {given.seed} {given.needles} {number}"
        row = make_row(tokenizer, given.tokens, given.needles, seed)
        print(json.dumps({"id": number, **row}))
    return 0
