"""Fidelity to dense attention, without labels: `nemo-star fidelity` from a checkout."""

import sys

from nemo_star.commands.fidelity import main
from nemo_star.runtime.launch import run_as_tool

if __name__ == "__main__":
    run_as_tool(lambda: main(sys.argv[1:]))
