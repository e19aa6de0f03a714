"""Convert checkpoints: Hugging Face -> Megatron dist_checkpoint and back.

python tools/convert_checkpoint.py import --source HF_DIR --target DIR [--dtype bfloat16|float16|float32]
python tools/convert_checkpoint.py export --source DIR --target HF_DIR
"""

import argparse
from pathlib import Path

from nemo_star.config.generate import DTYPES
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.launch import run_as_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True)
    importing = actions.add_parser("import", help="Hugging Face directory -> converted checkpoint")
    exporting = actions.add_parser("export", help="converted checkpoint -> Hugging Face directory")
    importing.add_argument("--dtype", choices=DTYPES, help="type to store; default: as the source stores it")
    for action in (importing, exporting):
        action.add_argument("--source", type=Path, required=True)
        action.add_argument("--target", type=Path, required=True, help="a directory that does not exist yet")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with no_garbage_collection():
        import torch  # only now, as it takes a second

        from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint

    if arguments.action == "import":
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        description = import_checkpoint(arguments.source, arguments.target, dtype)
    else:
        description = export_checkpoint(arguments.source, arguments.target)
    print(f"{arguments.target}: {description.architecture}, {description.model.num_layers} layers, {description.dtype}")
    return 0


if __name__ == "__main__":
    run_as_tool(main)
