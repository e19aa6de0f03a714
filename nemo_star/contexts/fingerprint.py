"""Which weights, and which context: what says that a stored one may be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nemo_star.checkpoint.description import DESCRIPTION_FILE, WEIGHTS_FOLDER, CheckpointDescription
from nemo_star.methods.method import Method

SAMPLED_BYTES = 4096
"""Of every SAMPLE_EVERY bytes of a weight file without a checksum."""
SAMPLE_EVERY = 2**20
EXACT_UNIT = 1024
"""Tokens of a block, to find texts that begin alike, where the method cuts a context anywhere."""


def weights_fingerprint(description: CheckpointDescription, checkpoint_folder: Path) -> str:
    """What tells the weights of one converted checkpoint from those of another, 64 hexadecimal digits.

    It covers nemo_star.json, which has the model's shape. Where that has no checksums of the weight files, two models
    of one shape would look alike, so it covers what says which tensor lies where (weights/.metadata), and 4 KiB of
    every MiB of the weights. To be called on one rank: it reads files.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.sha256((checkpoint_folder / DESCRIPTION_FILE).read_bytes())
    if description.sha256:
        return found.hexdigest()
    weights = checkpoint_folder / WEIGHTS_FOLDER
    metadata = weights / ".metadata"
    if metadata.is_file():
        found.update(metadata.read_bytes())
    for name in sorted(description.weight_files):
        with (weights / name).open("rb") as file:
            for start in range(0, description.weight_files[name], SAMPLE_EVERY):
                file.seek(start)
                found.update(file.read(SAMPLED_BYTES))
    return found.hexdigest()


def root_digest(fingerprint: str, method: Method, *, owner: str, parts: Sequence[str]) -> bytes:
    """What all contexts share whose K/V are computed alike and may be used by the same owner.

    Args:
        method: sizes settled; which kernel computes makes no difference but rounding, so it is left out.
        parts: further words that tell contexts apart: types, a salt.
    """
    settings = dataclasses.asdict(method.settings)
    del settings["kernel"]
    words = [fingerprint, settings, owner, *parts]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).digest()


def owner_digest(salt: str, owner: str) -> str:
    """What stands for an owner in the names of files."""
    return hashlib.sha256(json.dumps([salt, owner]).encode()).hexdigest()[:32]


def unit_of(method: Method, context_tokens: int) -> int:
    """Tokens of the blocks by which texts that begin alike are found."""
    return method.sizes(context_tokens)[0] if method.has_blocks else EXACT_UNIT


def block_digests(root: bytes, ids: Tensor, unit: int) -> list[bytes]:
    """A digest for each whole block of `ids` [tokens] int32, of all tokens up to its end; the last one is of all
    tokens, and of their number."""
    found, digest, content = [], root, ids.numpy()
    whole = len(ids) // unit * unit
    for start in range(0, whole, unit):
        digest = hashlib.sha256(digest + content[start : start + unit].tobytes()).digest()
        found.append(digest)
    return [*found, end_digest(digest, ids[whole:], len(ids))]


def end_digest(before: bytes, rest: Tensor, tokens: int) -> bytes:
    """Of a whole text of so many tokens: the digest of its last whole block, and the `rest` after that."""
    return hashlib.sha256(before + rest.numpy().tobytes() + f"end {tokens}".encode()).digest()
