"""Recorded signatures of Transformer Engine's releases (tools/te_signatures.py)."""

import inspect
import json

from launch import ROOT

RELEASES = json.loads((ROOT / "tests/data/te_signatures.json").read_text())


def signature(parameters):
    """An inspect.Signature of recorded parameters."""
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(name, getattr(kinds, kind), default=None if optional else kinds.empty)
            for name, kind, optional in parameters
        ]
    )
