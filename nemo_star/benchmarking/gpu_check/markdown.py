"""results.md: a section a step, each with its command, commit, machine and date, as BENCHMARKS.md has them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def document(records: Sequence[Record], about: Mapping[str, Any]) -> str:
    """All steps so far."""
    lines = [f"# GPU check: {about['machine']}", "", f"{told(about)}."]
    lines += ["", "| step | state | seconds | limit |", "|---|---|---:|---:|"]
    for record in records:
        seconds = f"{record['seconds']:.0f}" if "seconds" in record else ""
        lines.append(f"| {record['name']} | {record['state']} | {seconds} | {record['limit_seconds']:g} |")
    for record in records:
        if record["state"] not in ("not begun", "running"):
            lines += ["", *section(record)]
    return "\n".join(lines) + "\n"


def section(record: Record) -> list[str]:
    """Lines of one step that was begun."""
    lines = [f"## {record['name']}", "", f"    {shlex.join(record['command'])}", ""]
    when = f"{told(record['about'])}; {record['started'][:10]}."
    if record["state"] == "done":
        lines.append(f"Done in {record['seconds']:.0f} s; {when}")
    else:
        after = f" after {record['seconds']:.0f} s" if "seconds" in record else ""
        lines.append(f"**{record['state'].capitalize()}**{after}: {record['reason']}; {when}")
    if record.get("markdown"):
        lines += ["", *record["markdown"]]
    if record.get("log_tail"):
        lines += ["", "The end of its log:", "", *(f"    {line}".rstrip() for line in record["log_tail"])]
    return lines


def told(about: Mapping[str, Any]) -> str:
    """What a measurement ran on, in words."""
    return "; ".join(
        f"{name} {about[key]}".strip()
        for key, name in (
            ("commit", "commit"),
            ("changes", "with changes"),
            ("machine", ""),
            ("gpus", "GPUs:"),
            ("driver", "driver"),
            ("torch", "torch"),
            ("cuda", "CUDA"),
            ("transformer_engine", "Transformer Engine"),
            ("python", "Python"),
        )
        if about.get(key) is not None
    )
