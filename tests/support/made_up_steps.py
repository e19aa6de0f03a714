"""Steps of tools/gpu_check.py that are a few words of Python."""

import os
from pathlib import Path

from nemo_star.benchmarking.gpu_check.results import TEXT
from nemo_star.benchmarking.gpu_check.run import carry_out
from nemo_star.benchmarking.gpu_check.steps import Step

ABOUT = {"commit": "abc", "machine": "a machine"}


def carry_out_these(folder, made_up, about=ABOUT):
    """Of (name, code, limit) each; a step that prints nothing has no rows."""
    steps = [Step(name, ("-c", code), limit, TEXT) for name, code, limit in made_up]
    return carry_out(steps, steps, Path(folder), about=about, environment=dict(os.environ))
