"""Worker of tests/distributed/test_fidelity.py: measurements at several layouts, and commands, in one launch."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from run_generate import drop_groups

from nemo_star.commands.fidelity import main as command
from nemo_star.config.llm import LLMConfig
from nemo_star.config.parallel import ParallelConfig
from nemo_star.config.sampling import SamplingParams
from nemo_star.evaluation.fidelity.measure import Measurement, Tokens
from nemo_star.llm.opened import OpenedModel
from nemo_star.methods.config import AttentionConfig
from nemo_star.runtime.launch import run_as_tool


def measured(run):
    """The lines of one sample, on the first rank."""
    tp, cp, pp = run["layout"]
    sample = Tokens(**run["sample"])
    config = LLMConfig(
        checkpoint=run["checkpoint"],
        attention=AttentionConfig(anchor_size=0, overlap_size=2 * len(sample.context)),  # of which dense takes none
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp
        ),
    )
    contenders = {name: AttentionConfig(**settings) for name, settings in run["contenders"].items()}
    with OpenedModel.opened(config) as llm:
        llm.load_weights()
        params = SamplingParams(max_tokens=run["max_tokens"], ignore_eos=True)
        measurement = Measurement(llm, contenders, rows=run["rows"], seed=1)
        lines = measurement.lines(sample, params, sinks=True)
    drop_groups()
    return lines


def commanded(arguments):
    """What a command printed as an error, if it was one."""
    try:
        command(arguments)
    except ValueError as error:
        return str(error)
    finally:
        drop_groups()
    return None


def main():
    file = Path(sys.argv[1])
    runs = json.loads(file.read_text())
    results = {
        "measured": [measured(run) for run in runs["measure"]],
        "commands": [commanded(arguments) for arguments in runs["commands"]],
    }
    if dist.get_rank() == 0:
        file.with_name("results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    run_as_tool(main)
