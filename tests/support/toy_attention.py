"""The prefill of toy_method.py."""

from nemo_star.attention.core import CoreAttention


class WindowAttention(CoreAttention):
    def prefill(self, q, k, v, step):
        own = slice(k.shape[0] - step.block.tokens, None)
        step.cache.append(self.layer_number, k[own], v[own])
        return self.state.kernel.prefill(q, k, v, self.scale)
