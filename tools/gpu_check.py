"""What a GPU can tell in its first hour: `nemo-star gpu-check` from a checkout."""

import sys

from nemo_star.commands.gpu_check import main
from nemo_star.runtime.launch import run_as_tool

if __name__ == "__main__":
    run_as_tool(lambda: main(sys.argv[1:]))
