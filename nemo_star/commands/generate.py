"""Answer questions about long contexts with a converted checkpoint; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.commands.importing import heavy_imports
from nemo_star.config.compose import compose
from nemo_star.config.generate import GenerateConfig

LITERAL_KEYS = (
    "checkpoint",
    "cache_dir",
    "cache.folder",
    "context",
    "context_file",
    "query",
    "query_file",
    "input",
    "output",
    "output_logits",
    "debug.dump",
)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: all answered; 3: some lines of the input were bad. Raises ValueError for a user's error."""
    config = compose(GenerateConfig, arguments, tool="generate", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    with heavy_imports(config):
        if config.interactive:
            from nemo_star.offline.chat import run
        else:
            from nemo_star.offline.generate import run

    return run(config)
