"""Make needle-in-a-haystack questions for tools/generate.py, and score its answers.

    python tools/needles.py make --tokenizer DIR --tokens 8000 --needles 4 --documents 50 > questions.jsonl
    python tools/needles.py score answers.jsonl

Documents and questions have RULER's wording (arXiv 2404.06654); an answer is right when it is the needle's value.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from nemo_star.evaluation.needles import fit_document, question
from nemo_star.runtime.launch import run_as_tool
from nemo_star.text.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="questions as JSON lines on standard output")
    making.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer files")
    making.add_argument("--tokens", type=int, required=True, help="most tokens of a context")
    making.add_argument("--needles", type=int, default=1, help="needles in a document, one of them asked for")
    making.add_argument("--documents", type=int, default=50)
    making.add_argument("--seed", type=int, default=0)
    scoring = actions.add_parser("score", help="share of right answers in a file of tools/generate.py")
    scoring.add_argument("answers", type=Path)
    return parser.parse_args()


def make_row(tokenizer: Tokenizer, tokens: int, needles: int, seed: str) -> dict[str, Any]:
    """One question about a document that is as long as `tokens` allows."""
    rng = random.Random(seed)
    document = fit_document(
        rng, tokens=tokens - 1, needles=needles, count_tokens=lambda text: len(tokenizer.encode_query(text))
    )
    key = rng.choice(list(document.needles))
    return {"context": document.text, "query": question(key), "outputs": [document.needles[key]]}


def main() -> int:
    arguments = parse_arguments()
    if arguments.action == "score":
        answers = [json.loads(line) for line in arguments.answers.read_text().splitlines()]
        right = sum(answer.get("text", "").strip() in answer["outputs"] for answer in answers)
        print(f"{right} of {len(answers)} right ({right / len(answers):.1%})")
        return 0
    tokenizer = Tokenizer.load(arguments.tokenizer)
    if tokenizer is None:
        raise ValueError(f"--tokenizer {arguments.tokenizer} holds no tokenizer files")
    for number in range(arguments.documents):
        seed = f"needles {arguments.seed} {arguments.needles} {number}"
        row = make_row(tokenizer, arguments.tokens, arguments.needles, seed)
        print(json.dumps({"id": number, **row}))
    return 0


if __name__ == "__main__":
    run_as_tool(main)
