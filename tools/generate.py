"""Answer questions about long contexts with a converted checkpoint.

    torchrun --nproc-per-node N tools/generate.py [--config-name RECIPE] [key=value ...]

`--help` lists the recipes and keys, `--cfg job` prints the composed recipe.
"""

from nemo_star.cli import run_tool
from nemo_star.config import GenerateConfig


def run(config: GenerateConfig) -> int:
    from nemo_star.generation import run  # after the recipe is checked: importing Megatron takes seconds

    return run(config)


LITERAL_KEYS = (
    "checkpoint",
    "context",
    "context_file",
    "query",
    "query_file",
    "input",
    "output",
    "output_logits",
)

if __name__ == "__main__":
    run_tool(GenerateConfig, run, config_name="generate", literal_keys=LITERAL_KEYS)
