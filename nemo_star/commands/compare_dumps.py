"""Compare each layer's output in two runs of `nemo-star generate debug.dump=FOLDER`.

    %(prog)s FOLDER OTHER_FOLDER

Prints, for each phase and layer, how far outputs at the same position lie apart, and where most. The first layer that
differs by more than rounding is where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_star.commands.arguments import parser


def main(arguments: Sequence[str]) -> int:
    """Exit code 0, whatever differs. Raises ValueError for a folder that holds no dump."""
    command = parser("compare-dumps", __doc__)
    command.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    folders = command.parse_args(arguments).folders
    from nemo_star.models.dump import compare_dumps, read_dump  # only now: torch takes seconds

    print(f"{'phase':<8} {'layer':<10} {'positions':>9} {'largest':>10} {'mean':>10}  at position")
    for phase, layer, count, largest, mean, position in compare_dumps(*map(read_dump, folders)):
        print(f"{phase:<8} {layer:<10} {count:>9} {largest:>10.3g} {mean:>10.3g}  {position}")
    return 0
