"""A running service (nemo-star serve) under load, as its clients see it.

%(prog)s --streams 8 32                      one after another, then side by side
%(prog)s --beside 32768                      the gap between tokens while so long a context is encoded
%(prog)s --requests 1000 --contexts 10       questions with known answers (the bundled model knows them)
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_star.commands.arguments import parser
from nemo_star.runtime.files import check_target, write_whole


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("benchmark-serve", __doc__)
    command.add_argument("--url", default="http://127.0.0.1:8000")
    command.add_argument("--api-key", help="default: NEMO_STAR_API_KEY of the environment, if it is set")
    command.add_argument("--tokens", type=int, default=64, help="of each answer")
    command.add_argument("--streams", type=int, nargs="*", default=[], help="answers under way at the same time")
    command.add_argument("--on", type=int, default=1, help="contexts that the streams ask of")
    command.add_argument("--context-tokens", type=int, default=4000, help="of each of them, roughly")
    command.add_argument("--beside", type=int, default=0, help="tokens of a context that is encoded beside 4 streams")
    command.add_argument("--requests", type=int, default=0, help="questions on several contexts in turn")
    command.add_argument("--contexts", type=int, default=10, help="that these are about")
    command.add_argument("--threads", type=int, default=8, help="that ask them")
    command.add_argument("--output", help="JSON file; must not exist")
    return command.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0, 1 where an answer was wrong. Raises ValueError for a user's error."""
    given = parse_arguments(arguments)
    check_target("--output", given.output, replace=False, ways="delete it")
    if not (given.streams or given.beside or given.requests):
        raise ValueError("nothing to measure: give --streams, --beside or --requests")
    # Only now: what says which machine this is imports torch.
    from nemo_star.benchmarking.service import Client, beside_a_prefill, many_contexts, side_by_side
    from nemo_star.runtime.machine import machine

    client = Client(given.url, given.api_key or os.environ.get("NEMO_STAR_API_KEY"))
    found: dict[str, object] = {**machine()}
    wrong = 0
    if given.streams:
        rows = side_by_side(
            client, given.streams, tokens=given.tokens, contexts=given.on, context_tokens=given.context_tokens
        )
        found["side_by_side"] = rows
        wrong += sum(row["different_texts"] for row in rows)
    if given.beside:
        found["beside_a_prefill"] = beside_a_prefill(
            client, streams=4, tokens=given.tokens, context_tokens=given.beside
        )
    if given.requests:
        many = many_contexts(
            client,
            requests=given.requests,
            contexts=given.contexts,
            context_tokens=given.context_tokens,
            threads=given.threads,
        )
        found["many_contexts"] = many
        wrong += many["requests"] - many["right"]
    text = json.dumps(found, indent=2)
    print(text)
    if given.output is not None:
        write_whole(Path(given.output), lambda file: file.write_text(text))
    return 1 if wrong else 0
