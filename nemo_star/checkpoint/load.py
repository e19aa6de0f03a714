"""A converted checkpoint into a model, at any layout."""

from __future__ import annotations

import warnings
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from nemo_star.checkpoint.description import WEIGHTS_FOLDER
from nemo_star.checkpoint.metadata import read_raw_metadata


def load_weights(model: GPTModel, checkpoint: Path, *, layer_by_layer: bool = False) -> None:
    """Fill `model` from `checkpoint`; each rank reads its own part. Stored types are cast to the model's.

    Args:
        layer_by_layer: layers are not all alike, so that the checkpoint has keys for each instead of stacked ones.

    Raises:
        ValueError: a tensor that the model needs is missing or has another shape; a `.metadata` that is another pickle.
    """
    read_raw_metadata(checkpoint / WEIGHTS_FOLDER)  # refuses what Megatron would run when it unpickles the same file
    wanted = model.sharded_state_dict(
        metadata={"dp_cp_group": model.pg_collection.dp_cp, "non_homogeneous_layers": layer_by_layer}
    )
    # Transformer Engine's fp8 state, which a converted checkpoint does not have.
    wanted = {name: value for name, value in wanted.items() if not name.endswith("_extra_state")}
    for weight in model.parameters():
        weight.data.zero_()  # rows that pad the vocabulary are in no checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ShardedTensor and load_state_dict, which Megatron uses
        for message in ("The argument order of load has been changed", "torch.distributed is disabled"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)  # how Megatron 0.19 calls torch
        try:
            loaded = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS_FOLDER), validate_access_integrity=False)
        except (CheckpointingException, CheckpointException) as error:  # torch's is a BaseException
            raise ValueError(f"checkpoint {checkpoint} does not fit the model: {error}") from error
    problems = model.load_state_dict(loaded, strict=False)
    assert not [name for name in problems.missing_keys if not name.endswith("_extra_state")], problems
