from . import distributed, ops
from .attention import DotProductAttention
from .module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm
