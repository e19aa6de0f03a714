from pathlib import Path
from typing import Any
from nemo_star.evaluation.fidelity.summary import summaries
from nemo_star.evaluation.fidelity.scores import correlations, largest_loss
def write_report(folder: Path, lines: Any, contenders: Any, scores: Any, *, about: str) -> str:
    for s in summaries(lines, contenders): print(s)
    if scores:
        for c in correlations(lines, scores): print(c)
        for c in largest_loss(lines, scores): print(c)
    return about
