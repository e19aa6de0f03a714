"""Convert checkpoints: Hugging Face -> Megatron dist_checkpoint and back.

%(prog)s import --source HF_DIR --target DIR [--dtype bfloat16|float16|float32]
%(prog)s export --source DIR --target HF_DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_star.commands.arguments import parser
from nemo_star.config.llm import DTYPES
from nemo_star.runtime.importing import no_garbage_collection


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("convert", __doc__)
    actions = command.add_subparsers(dest="action", required=True)
    importing = actions.add_parser("import", help="Hugging Face directory -> converted checkpoint")
    exporting = actions.add_parser("export", help="converted checkpoint -> Hugging Face directory")
    importing.add_argument("--dtype", choices=DTYPES, help="type to store; default: as the source stores it")
    for action in (importing, exporting):
        action.add_argument("--source", type=Path, required=True)
        action.add_argument("--target", type=Path, required=True, help="a directory that does not exist yet")
    return command.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    given = parse_arguments(arguments)
    with no_garbage_collection():
        import torch  # only now, as it takes a second

        from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint

    if given.action == "import":
        dtype = getattr(torch, given.dtype) if given.dtype else None
        description = import_checkpoint(given.source, given.target, dtype)
    else:
        description = export_checkpoint(given.source, given.target)
    print(f"{given.target}: {description.architecture}, {description.model.num_layers} layers, {description.dtype}")
    return 0
