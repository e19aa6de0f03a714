"""Compare each layer's output in two runs of tools/generate.py debug.dump=FOLDER.

    python tools/compare_dumps.py FOLDER OTHER_FOLDER

Prints, for each phase and layer, how far outputs at the same position lie apart, and where most. The first layer that
differs by more than rounding is where to look.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    folders = parser.parse_args(arguments).folders
    from nemo_star.models.dump import compare_dumps, read_dump  # only now: torch takes seconds

    print(f"{'phase':<8} {'layer':<10} {'positions':>9} {'largest':>10} {'mean':>10}  at position")
    for phase, layer, count, largest, mean, position in compare_dumps(*map(read_dump, folders)):
        print(f"{phase:<8} {layer:<10} {count:>9} {largest:>10.3g} {mean:>10.3g}  {position}")
    return 0
