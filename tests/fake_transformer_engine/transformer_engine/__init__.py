"""A stand-in for Transformer Engine, in torch and on CPU: the parts that Megatron's GPT layer and our kernel call.

It computes what Transformer Engine computes, so that what stands around it (layer spec, checkpoint keys, layouts,
masks) is tested on numbers, and notes every attention call in `calls`.
"""

from . import common, pytorch

__version__ = "2.9.0"
