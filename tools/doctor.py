"""Say what is installed, what works, and which attention kernel would run.

    python tools/doctor.py

Exit code 0 where the project runs (also where something optional is missing or broken), 1 where it cannot.
"""

import argparse
import warnings

from nemo_star.commands.doctor import examine
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.launch import EXIT_ERROR, run_as_tool


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    with warnings.catch_warnings(), no_garbage_collection():
        warnings.simplefilter("ignore")  # of Megatron's imports, about what is reported here
        findings = examine()
    print(*findings, sep="\n")
    return EXIT_ERROR if any(finding.kind == "fatal" for finding in findings) else 0


if __name__ == "__main__":
    run_as_tool(main)
