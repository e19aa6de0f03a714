"""An OpenAI-compatible service over HTTP; `--help` prints the keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from nemo_star.commands.importing import heavy_imports
from nemo_star.config.compose import compose
from nemo_star.config.serve import ServeConfig

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
    with heavy_imports(config):
        from nemo_star.server.run import run

    return run(config)
