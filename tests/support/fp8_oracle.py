"""Star Attention over a cache in eight bits as transformers computes it: its models, in float64, with masks and a cache
of ours. The cache rounds K and V as it takes them; what is encoded sees its own unrounded, as a prefill does, and what
it finds rounded. Shares no code with what is tested.
"""

import torch
from star_masks import FULL, WINDOWED, star_masks
from transformers import DynamicCache

TYPES = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}
"""Name -> type, its largest value (OCP OFP8, table 2)."""


def rounded(x, name):
    """The nearest values of the type, in x's own type."""
    dtype, most = TYPES[name]
    return torch.where(x.abs() > most, x.sign() * most, x).to(dtype).to(x.dtype)


class RoundingCache(DynamicCache):
    """Of one sequence; `encodes` says what tokens see of their own K and V."""

    def __init__(self, name):
        super().__init__()
        self.name, self.encodes, self.held = name, True, {}

    def update(self, key_states, value_states, layer_idx, *_, **__):
        new = key_states, value_states
        past = self.held.get(layer_idx, [x[:, :, :0] for x in new])
        kept = [rounded(x, self.name) if self.name else x for x in new]
        self.held[layer_idx] = [torch.cat(pair, dim=2) for pair in zip(past, kept, strict=True)]
        seen = new if self.encodes else kept
        return tuple(torch.cat(pair, dim=2) for pair in zip(past, seen, strict=True))

    def get_seq_length(self, layer_idx=0):
        return self.held[layer_idx][0].shape[2] if layer_idx in self.held else 0

    def cut(self, tokens):
        self.held = {layer: [x[:, :, :tokens] for x in kv] for layer, kv in self.held.items()}

    def copy(self):
        copied = RoundingCache(self.name)
        copied.held = dict(self.held)
        return copied


class Oracle:
    """One context of one model, and answers on it.

    Args:
        model: transformers', in float64, with eager attention.
        name: of the type; None: nothing is rounded.
        block: and an anchor of as many tokens; None: exact attention.
    """

    def __init__(self, model, ids, *, name, block=None):
        self.model, self.block, self.ids = model, block, list(ids)
        self.cache = RoundingCache(name)
        self._run(self.cache, self.ids, len(ids), 0)

    def go_on(self, ids):
        """As `Engine.extend`: star drops a short last block and encodes again; exact methods go on as queries do."""
        first = len(self.ids) if self.block is None else len(self.ids) // self.block * self.block
        self.cache.cut(first)
        self.ids += ids
        self.cache.encodes = self.block is not None
        self._run(self.cache, self.ids, len(self.ids), first)

    def greedy(self, query, count):
        """(tokens, logits [count, vocab])."""
        cache, ids, rows = self.cache.copy(), [*self.ids, *query], []
        cache.encodes, first = False, len(self.ids)
        for _ in range(count):
            rows.append(self._run(cache, ids, len(self.ids), first)[-1])
            first = len(ids)
            ids.append(int(rows[-1].argmax()))
        return ids[-count:], torch.stack(rows)

    def _run(self, cache, ids, context, first):
        """Logits [tokens, vocab] of the tokens from `first` on."""
        window, block = getattr(self.model.config, "sliding_window", None), self.block or len(ids)
        masks = star_masks(len(ids), context, block=block, anchor=block, window=window)
        masks = {kind: mask[:, :, first:] for kind, mask in masks.items()}
        if getattr(self.model.config, "layer_types", None) is None:
            masks = masks[WINDOWED if window else FULL]
        with torch.no_grad():
            given = {"position_ids": torch.arange(first, len(ids))[None], "past_key_values": cache, "use_cache": True}
            return self.model(torch.tensor([ids[first:]]), attention_mask=masks, **given).logits[0]
