import os

import torch

from ..calls import CALLS
from ..cpp_extensions.fused_attn import attend


class DotProductAttention(torch.nn.Module):
    def __init__(self, *args, **keywords):
        CALLS.append(("DotProductAttention.__init__", (None, *args), keywords))
        super().__init__()
        self.options = keywords

    def forward(self, *args, **keywords):
        CALLS.append(("DotProductAttention.forward", (self, *args), keywords))
        q, k, v = args
        assert os.environ.get("NVTE_UNFUSED_ATTN") == "0", "without a fused backend it would write the score matrix"
        packed = any(x.storage_offset() for x in map(torch.Tensor.contiguous, args))
        assert not packed, "The provided qkv memory layout is not supported!"
        assert (q.shape[2], k.shape[2]) == (self.options["num_attention_heads"], self.options["num_gqa_groups"])
        mask = keywords.get("attn_mask_type", self.options["attn_mask_type"])
        left, right = keywords["window_size"]
        assert right == 0
        return attend(q, k, v, self.options["softmax_scale"], mask, left)[0].flatten(2)
