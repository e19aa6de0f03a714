"""Plan memory and time of a long context before anything runs.

    python tools/plan.py [model=llama3_1_8b] [machine=h100] [context_tokens=131072] [world_size=8] [output=FILE.json]
    python tools/plan.py validate=true
    python tools/plan.py check=ROWS.json model=small machine=cpu

`--help` lists the machines, models and keys. It is one process: no torchrun.
"""

import sys
from collections.abc import Sequence

from nemo_star.config.compose import compose
from nemo_star.config.plan import PlanConfig
from nemo_star.planning.report import run
from nemo_star.runtime.launch import run_as_tool


def main(arguments: Sequence[str]) -> int:
    config = compose(PlanConfig, arguments, tool="plan", literal_keys=("output", "check"))
    return 0 if config is None else run(config)


if __name__ == "__main__":
    run_as_tool(lambda: main(sys.argv[1:]))
