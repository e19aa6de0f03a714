"""Compare each layer's output in two runs of tools/generate.py: see nemo_star/commands/compare_dumps.py."""

import sys

from nemo_star.commands.compare_dumps import main
from nemo_star.runtime.launch import run_as_tool

if __name__ == "__main__":
    run_as_tool(lambda: main(sys.argv[1:]))
