"""How a step's result becomes rows, and rows become Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_TEST_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def _problem_of_rows(rows: Sequence[Row]) -> str | None:
    return None if rows else "it left no rows"


@dataclass(frozen=True)
class Result:
    """Of one kind of command. What a step that was ended early has left is read, too."""

    read: Callable[[Path, str], list[Row]]
    """(file of rows, which may be missing; log) -> rows."""
    markdown: Callable[[Sequence[Row]], list[str]]
    """Lines of a table."""
    problem: Callable[[Sequence[Row]], str | None] = _problem_of_rows
    """Why rows of a command with exit code 0 are no success."""


def _read_json(output: Path, log: str) -> list[Row]:
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else []


def _read_text(output: Path, log: str) -> list[Row]:
    return [{"text": line} for line in log.splitlines() if line.strip()]


def _read_tests(output: Path, log: str) -> list[Row]:
    return [{"test": name, "outcome": outcome.lower()} for name, outcome in _TEST_LINE.findall(log)]


def _problem_of_tests(rows: Sequence[Row]) -> str | None:
    return None if any(row["outcome"] == "passed" for row in rows) else f"of {len(rows)} tests none ran and passed"


def _text(rows: Sequence[Row]) -> list[str]:
    return [f"    {row['text']}" for row in rows]


def _tests(rows: Sequence[Row]) -> list[str]:
    counts = {name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed", "error", "skipped")}
    failed = [f"- {row['outcome']}: `{row['test']}`" for row in rows if row["outcome"] in ("failed", "error")]
    return [*table(list(counts), [[str(count) for count in counts.values()]], text_columns=0), *_after_blank(failed)]


def _after_blank(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _kernels(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        start = [row["phase"], row["kernel"], row["dtype"], f"{row['queries']:,}", f"{row['keys']:,}"]
        if row["seconds"] is None:
            cells.append([*start, "", "", _withheld(row)])
            continue
        rate = f"{row['tflops']:.3g} TFLOP/s" if "tflops" in row else f"{row['bytes_per_second'] / 1e9:.4g} GB/s"
        cells.append([*start, _ms(row["seconds"]), _ms(row["first_seconds"]), rate])
    return table(["phase", "kernel", "type", "queries", "keys", "ms", "first call ms", "rate"], cells, text_columns=3)


def _models(rows: Sequence[Row]) -> list[str]:
    """`times` and `FLOPs` are ratios over the first at that length; `over the read`: a token's attention over a plain
    read of its K/V."""
    titles = ["kind", "kernels", "context", "prefill s", "times", "FLOPs", "first prefill s", "first token ms"]
    titles += ["decode ms a token", "over the read", "peak GiB"]
    first: dict[int, Row] = {}
    cells = []
    for row in rows:
        if row["withheld"] is not None:
            cells.append([row["kind"], "", f"{row['context_tokens']:,}", _withheld(row)])
            continue
        base = first.setdefault(row["context_tokens"], row)
        cells.append(
            [
                row["kind"],
                row["kernel"] or "",
                f"{row['context_tokens']:,}",
                f"{row['prefill_seconds']:.3f}",
                _ratio(row, base, "prefill_seconds"),
                _ratio(row, base, "prefill_flops"),
                f"{row['first_round']['prefill_seconds']:.3f}",
                _ms(row["first_round"].get("first_token_seconds")),
                _ms(row["decode_seconds_per_token"]),
                _over_the_read(row),
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
            ]
        )
    return table(titles, cells, text_columns=2)


def _decode(rows: Sequence[Row]) -> list[str]:
    """First: in the first round at that length. The other columns are medians of all rounds."""
    titles = ["kind", "kernels", "cached", "first: token 1 ms", "first: ms a token", "token 1 ms", "ms a token"]
    titles += ["attention ms", "read of the K/V ms", "over the read"]
    cells = []
    for row in rows:
        if row["withheld"] is not None:
            cells.append([row["kind"], "", f"{row['context_tokens']:,}", _withheld(row)])
            continue
        first = row["first_round"]
        cells.append(
            [
                row["kind"],
                row["kernel"],
                f"{row['context_tokens']:,}",
                _ms(first["first_token_seconds"]),
                _ms(first["decode_seconds_per_token"]),
                _ms(row["first_token_seconds"]),
                _ms(row["decode_seconds_per_token"]),
                _ms(row["decode_attention_seconds"]),
                _ms(row["kv_read_seconds"]),
                _over_the_read(row),
            ]
        )
    return table(titles, cells, text_columns=2)


def table(titles: Sequence[str], cells: Sequence[Sequence[str]], *, text_columns: int) -> list[str]:
    """Lines of a Markdown table; short rows are filled up, numbers stand to the right."""
    rule = "|" + "|".join("---" if column < text_columns else "---:" for column in range(len(titles))) + "|"
    rows = [[*row, *[""] * (len(titles) - len(row))] for row in cells]
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _withheld(row: Row) -> str:
    return "withheld: " + " ".join(str(row["withheld"]).replace("|", "\\|").split())


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(row: Row, base: Row, key: str) -> str:
    return f"{row[key] / base[key]:.2f}"


def _over_the_read(row: Row) -> str:
    attention, read = row.get("decode_attention_seconds"), row.get("kv_read_seconds")
    return f"{attention / read:.2f}" if attention is not None and read else ""


TEXT = Result(_read_text, _text)
TESTS = Result(_read_tests, _tests, _problem_of_tests)
KERNELS = Result(_read_json, _kernels)
MODELS = Result(_read_json, _models)
DECODE = Result(_read_json, _decode)
