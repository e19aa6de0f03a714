"""What the commands share whose arguments are flags, not Hydra's keys."""

from __future__ import annotations

import argparse

from nemo_star.runtime.program import started_as


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Arguments of `command`; in its description, %(prog)s is how this process was started."""
    return argparse.ArgumentParser(
        prog=started_as(command)[0],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
