"""Attention kinds behind Megatron's `core_attention` socket."""

from nemo_star.attention.anchor import SharedAnchor
from nemo_star.attention.core import AttentionState, CoreAttention
from nemo_star.attention.dense import DenseAttention
from nemo_star.attention.ring import RingAttention
from nemo_star.attention.star import StarAttention
from nemo_star.attention.ulysses import UlyssesAttention

ATTENTION: dict[str, type[CoreAttention]] = {
    "star": StarAttention,
    "dense": DenseAttention,
    "ring": RingAttention,
    "ulysses": UlyssesAttention,
}
"""Attention kind of the recipe -> module of the layer spec."""

__all__ = ["ATTENTION", "AttentionState", "CoreAttention", "SharedAnchor"]
