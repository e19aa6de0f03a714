"""Plan memory and time of a long context before anything runs, in one process; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.config.compose import compose
from nemo_star.config.plan import PlanConfig
from nemo_star.planning.report import run


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    config = compose(PlanConfig, arguments, tool="plan", literal_keys=("output", "check"))
    return 0 if config is None else run(config)
