"""A conversation about one long text: `generate` with interactive=true, and its keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.commands import generate


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    return generate.main([*arguments, "interactive=true"])
