"""From a method's description to its module in Megatron's layer spec."""

from __future__ import annotations

import importlib

from nemo_star.attention.core import CoreAttention
from nemo_star.methods.method import Method


def attention_class(method: Method) -> type[CoreAttention]:
    """The core attention that `method.attention` names as `module:Class`."""
    module, _, name = method.attention.partition(":")
    found: type[CoreAttention] = getattr(importlib.import_module(module), name)
    return found
