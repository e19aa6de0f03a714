"""A converted checkpoint on disk, and what describes it.

DIR/nemo_star.json   format, architecture, model shape, type of the weights, sizes and checksums of the weight files
DIR/weights/         Megatron dist_checkpoint (torch_dist), layers stacked; loads at any tp and pp
DIR/hf/              configuration and tokenizer files as imported; export gives them back
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_star.config.model import ModelConfig
from nemo_star.config.strict import parse

FORMAT_VERSION = 2
"""What is written: 2 has checksums, and weights in several files."""
READABLE_VERSIONS = (1, 2)
DESCRIPTION_FILE = "nemo_star.json"
WEIGHTS_FOLDER = "weights"
HF_FOLDER = "hf"


@dataclass(frozen=True)
class CheckpointDescription:
    """Content of nemo_star.json."""

    format_version: int
    architecture: str
    """Hugging Face's name, e.g. LlamaForCausalLM: selects the mapping table for export."""
    dtype: str
    """Type of most weights, as stored."""
    model: ModelConfig
    weight_files: dict[str, int]
    """Name in weights/ -> bytes, so that a truncated copy is noticed before anything is loaded."""
    sha256: dict[str, str] = field(default_factory=dict)
    """The same names -> checksum; empty in format version 1."""
    unstacked: bool = False
    """Whether keys name each layer though all are alike: some checkpoints of Megatron, imported as they lay."""


def write_description(directory: Path, description: CheckpointDescription) -> None:
    text = json.dumps(asdict(description), indent=2)
    (directory / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")


def describe_files(
    directory: Path, description: CheckpointDescription, known: Mapping[str, str]
) -> CheckpointDescription:
    """The description with sizes and checksums of all weight files; `known` has checksums that need not be made."""
    files = sorted(file for file in (directory / WEIGHTS_FOLDER).iterdir() if file.is_file())
    return replace(
        description,
        weight_files={file.name: file.stat().st_size for file in files},
        sha256={file.name: known.get(file.name) or checksum(file) for file in files},
    )


def checksum(file: Path) -> str:
    """SHA-256, which CPUs have instructions for, in hexadecimal digits as `sha256sum` prints it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_description(directory: Path) -> CheckpointDescription:
    """Read and check the description of a converted checkpoint.

    Raises:
        ValueError: not a converted checkpoint, of another format version, or with missing or truncated weight files.
    """
    file = directory / DESCRIPTION_FILE
    if not directory.is_dir():
        raise ValueError(f"checkpoint {directory} does not exist or is not a directory")
    if not file.is_file():
        hint = ""
        if (directory / "config.json").is_file():
            hint = " It looks like a Hugging Face checkpoint: convert it first, "
            hint += f"nemo-star convert import --source {directory} --target DIR"
        elif any(next(directory.glob(f"{place}.metadata"), None) for place in ("", "weights/", "iter_*/")):
            hint = " It looks like one of NeMo 2 or Megatron: import it first, "
            hint += f"nemo-star convert import --source {directory} --target DIR --hf-config HF_DIR"
        raise ValueError(f"checkpoint {directory} is not a converted checkpoint: it has no {DESCRIPTION_FILE}.{hint}")
    try:
        values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = values["format_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {directory}: {DESCRIPTION_FILE} is damaged ({error}); convert again") from error
    if version not in READABLE_VERSIONS:
        words = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"checkpoint {directory} has format version {version}, this program reads {words}")
    try:
        description = parse(CheckpointDescription, values)
    except ValueError as error:
        raise ValueError(f"checkpoint {directory}: {DESCRIPTION_FILE} is damaged ({error}); convert again") from error
    _check_files(directory, description)
    return description


def _check_files(directory: Path, description: CheckpointDescription) -> None:
    for name, size in description.weight_files.items():
        file = directory / WEIGHTS_FOLDER / name
        if not file.is_file():
            raise ValueError(f"checkpoint {directory} is incomplete: {WEIGHTS_FOLDER}/{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(
                f"checkpoint {directory} is damaged: {WEIGHTS_FOLDER}/{name} has {file.stat().st_size} bytes, "
                f"should have {size}; copy or convert it again"
            )
