"""Worker of test_harness_ranks.py: lm-evaluation-harness on the ranks of one launch, at several layouts."""

import json
import os
import sys
from pathlib import Path

from harness_tasks import ask, asked

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def main(requests, output):
    requests = json.loads(Path(requests).read_text())
    os.environ.update(dict.fromkeys(OFFLINE, "1"), HF_HOME=requests["cache"])

    from nemo_star import LLM
    from nemo_star.commands.harness import main as harness
    from nemo_star.evaluation.harness.model import NemoStar
    from nemo_star.parallel.groups import gather_objects

    def led(evaluate, **options):
        """What `lead` gives, or the error that it raises."""
        with LLM(requests["checkpoint"], attention=requests["attention"], **options) as llm:
            lm = NemoStar(llm)
            try:
                return lm.lead(lambda: evaluate(lm))
            except Exception as error:
                return f"{type(error).__name__}: {error}"

    found = {
        name: led(lambda lm: ask(lm, asked()), parallel=parallel) for name, parallel in requests["layouts"].items()
    }
    errors = {
        "refused": led(lambda lm: ask(lm, {"generate_until": [("a", {"beams": 2})]})),
        "broken": led(lambda lm: 1 / 0),
    }
    for arguments in requests["commands"]:
        assert harness(arguments) == 0
    report = gather_objects((found, errors))
    if int(os.environ["RANK"]) == 0:
        Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
