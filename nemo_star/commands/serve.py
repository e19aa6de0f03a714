"""An OpenAI-compatible service over HTTP; `--help` prints the keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.config.compose import compose
from nemo_star.config.serve import ServeConfig
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.transformer_engine import prepare_imports

LITERAL_KEYS = ("checkpoint", "cache_dir", "cache.folder", "server.api_keys_file", "server.model_name")
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 after SIGTERM or SIGINT. Raises ValueError for a user's error."""
    config = compose(ServeConfig, arguments, tool="serve", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'nemo-star[serve]'")
    # A wrong path is found before torch and Megatron are imported, which takes seconds.
    place = locate_checkpoint(Path(str(config.checkpoint)), config.cache_dir)
    if not place.is_missing:
        read_description(place.converted)
    with no_garbage_collection():
        prepare_imports()
        from nemo_star.server.run import run  # only now: importing Megatron takes seconds

    return run(config)
