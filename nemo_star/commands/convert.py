"""Convert checkpoints: Hugging Face -> Megatron dist_checkpoint and back; look at them, and check them.

%(prog)s import --source HF_DIR --target DIR [--dtype bfloat16|float16|float32] [--processes N]
%(prog)s import --source NEMO2_DIR|BRIDGE_DIR --target DIR [--hf-config HF_DIR] [--copy]
%(prog)s export --source DIR --target HF_DIR [--processes N]
%(prog)s inspect --source ANY_DIR
%(prog)s verify --source DIR
%(prog)s check --source HF_DIR --checkpoint DIR

An import or export that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_star.commands.arguments import parser
from nemo_star.config.llm import DTYPES
from nemo_star.runtime.importing import no_garbage_collection

EXIT_DIFFERENT = 1


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("convert", __doc__)
    actions = command.add_subparsers(dest="action", required=True)
    importing = actions.add_parser("import", help="Hugging Face, NeMo 2 or Megatron directory -> converted checkpoint")
    exporting = actions.add_parser("export", help="converted checkpoint -> Hugging Face directory")
    inspecting = actions.add_parser("inspect", help="print what a checkpoint is")
    verifying = actions.add_parser("verify", help="compare a converted checkpoint's files with their checksums")
    checking = actions.add_parser("check", help="compare logits with transformers on random ids, where the model fits")
    importing.add_argument(
        "--dtype", choices=DTYPES, help="type to store; default: the source's, bfloat16 of quantized"
    )
    importing.add_argument("--hf-config", type=Path, help="NeMo 2, Megatron: folder with config.json and tokenizer")
    importing.add_argument("--copy", action="store_true", help="NeMo 2, Megatron: copy weights, do not link to them")
    for action in (importing, exporting):
        action.add_argument("--target", type=Path, required=True, help="a directory that does not exist yet")
        action.add_argument("--processes", type=_positive, default=1, help="that convert files at the same time")
    for action in (importing, exporting, inspecting, verifying, checking):
        action.add_argument("--source", type=Path, required=True)
    checking.add_argument("--checkpoint", type=Path, required=True, help="what --source was converted into")
    checking.add_argument("--tokens", type=_positive, default=96, help="random ids (default: %(default)s)")
    checking.add_argument("--steps", type=_positive, default=32, help="of them compared (default: %(default)s)")
    checking.add_argument("--seed", type=int, default=1, help="of the ids (default: %(default)s)")
    checking.add_argument("--tolerance", type=float, default=0.01, help="largest difference (default: %(default)s)")
    return command.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def main(arguments: Sequence[str]) -> int:
    """Exit code 0; 1 where `check` finds a difference. Raises ValueError for a user's error."""
    given = parse_arguments(arguments)
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "import": _import,
        "export": _export,
        "inspect": _inspect,
        "verify": _verify,
        "check": _check,
    }
    return actions[given.action](given)


def _import(given: argparse.Namespace) -> int:
    from nemo_star.checkpoint.megatron import find_megatron_checkpoint

    found = find_megatron_checkpoint(given.source)
    if found is not None and given.dtype:
        raise ValueError(f"--dtype does not go with a checkpoint of {found.kind}: its weights are taken as they are")
    if found is None and (given.hf_config or given.copy):
        raise ValueError(
            f"--hf-config and --copy are for checkpoints of NeMo 2, Megatron-Bridge and Megatron-LM; {given.source} is "
            "none"
        )
    with no_garbage_collection():
        import torch  # only now, as it takes a second

        from nemo_star.checkpoint.adopting import adopt_checkpoint
        from nemo_star.checkpoint.importing import import_checkpoint

    if found is not None:
        description = adopt_checkpoint(found, given.target, given.hf_config, copy=given.copy)
    else:
        dtype = getattr(torch, given.dtype) if given.dtype else None
        description = import_checkpoint(given.source, given.target, dtype, processes=given.processes)
    print(f"{given.target}: {description.architecture}, {description.model.num_layers} layers, {description.dtype}")
    if found is not None and not given.copy:
        print(f"its weight files are links into {found.weights.resolve()}: keep that folder")
    return 0


def _export(given: argparse.Namespace) -> int:
    with no_garbage_collection():
        from nemo_star.checkpoint.exporting import export_checkpoint

    description = export_checkpoint(given.source, given.target, processes=given.processes)
    print(f"{given.target}: {description.architecture}, {description.model.num_layers} layers, {description.dtype}")
    return 0


def _inspect(given: argparse.Namespace) -> int:
    from nemo_star.checkpoint.inspection import inspect_checkpoint

    for line in inspect_checkpoint(given.source):
        print(line)
    return 0


def _verify(given: argparse.Namespace) -> int:
    from nemo_star.checkpoint.description import read_description
    from nemo_star.checkpoint.verify import verify_checkpoint

    description = read_description(given.source)
    verify_checkpoint(given.source, description)
    print(f"{given.source}: {len(description.sha256)} files have the checksums of their conversion")
    return 0


def _check(given: argparse.Namespace) -> int:
    from nemo_star.runtime.transformer_engine import prepare_imports

    with no_garbage_collection():
        prepare_imports()
        from nemo_star.evaluation.agreement import compare_with_transformers

    found = compare_with_transformers(
        given.source, given.checkpoint, tokens=given.tokens, steps=given.steps, seed=given.seed
    )
    print(
        f"largest difference of a logit {found.difference:.3g} (tolerance {given.tolerance:g}), same greedy token at "
        f"{found.greedy} of {found.steps} steps"
    )
    return 0 if found.difference <= given.tolerance else EXIT_DIFFERENT
