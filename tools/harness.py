"""Tasks of lm-evaluation-harness: `nemo-star harness` from a checkout."""

import sys

from nemo_star.commands.harness import main
from nemo_star.runtime.launch import run_as_tool

if __name__ == "__main__":
    run_as_tool(lambda: main(sys.argv[1:]))
