"""Star Attention as transformers computes it: its models, in float64, with masks of ours. An oracle for several blocks
in any family, windowed layers included, that shares no code with what is tested.
"""

import torch

FULL, WINDOWED = "full_attention", "sliding_attention"


def star_masks(total, context, *, block, anchor, window=None):
    """{kind of layers: mask [1, 1, total, total], to be added to scores} for [context | query | answer].

    A layer that sees everything: a block sees itself, causally, and the first `anchor` tokens of the first one; what
    follows the context sees all before it. A windowed layer: a token sees itself and the `window` - 1 before it,
    wherever blocks begin.
    """
    row, column = torch.arange(total)[:, None], torch.arange(total)[None]
    causal = column <= row
    same_block = row // block == column // block
    full = causal & (same_block | (column < anchor) | (row >= context))
    seen = {FULL: full}
    if window is not None:
        seen[WINDOWED] = causal & (row - column < window)
    return {
        kind: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))[None, None]
        for kind, mask in seen.items()
    }


def overlapping_masks(total, context, *, block, anchor, overlap, window=None):
    """(positions that run again, masks as above over [these | context | query | answer]).

    Tokens that a block overlaps with stand in the sequence a second time, each block's own, and only the block sees
    them: in their place it sees them instead of the context's.
    """
    begins = [0, *(max(min(anchor, start), start - overlap) for start in range(block, context, block))]
    again = [(place, number) for number, begin in enumerate(begins[1:], 1) for place in range(begin, number * block)]
    place = torch.tensor([*(at for at, _ in again), *range(total)])
    of_block = torch.tensor([*(number for _, number in again), *(token // block for token in range(total))])
    is_again = torch.arange(len(place)) < len(again)
    follows = ~is_again & (place >= context)
    begin = torch.tensor([*begins, *[0] * (total // block + 1)])[of_block]
    row, column = (slice(None), None), (None, slice(None))
    causal = (place[column] <= place[row]) & ~(follows[column] & ~follows[row])
    together = (of_block[row] == of_block[column]) & ~follows[row]
    own = together & (is_again[column] | ~is_again[row])  # what runs again sees no token of the block it runs before
    seen = {FULL: causal & (own | (~is_again[column] & ((place[column] < anchor) | follows[row])))}
    if window is not None:
        before = ~is_again[column] & ((place[column] < begin[row]) | follows[row])
        seen[WINDOWED] = causal & (own | before) & (place[row] - place[column] < window)
    return [at for at, _ in again], {
        kind: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))[None, None]
        for kind, mask in seen.items()
    }


def masked_logits(model, ids, masks, positions=None):
    """Logits [s, vocab] of transformers' model under these masks."""
    if getattr(model.config, "layer_types", None) is None:
        masks = masks[WINDOWED if getattr(model.config, "sliding_window", None) else FULL]
    with torch.no_grad():
        at = None if positions is None else torch.tensor([positions])
        return model(torch.tensor([ids]), attention_mask=masks, position_ids=at, use_cache=False).logits[0]


def star_greedy(model, context, query, count, *, block, anchor, overlap=0):
    """(tokens, logits [count, vocab]) of the answer, the whole sequence anew for each token.

    Args:
        model: transformers', in float64, with eager attention.
    """
    ids, rows = [*context, *query], []
    for _ in range(count):
        sizes = {"block": block, "anchor": anchor, "window": getattr(model.config, "sliding_window", None)}
        if overlap:
            again, masks = overlapping_masks(len(ids), len(context), overlap=overlap, **sizes)
            run, positions = [context[at] for at in again] + ids, [*again, *range(len(ids))]
            rows.append(masked_logits(model, run, masks, positions)[-1])
        else:
            rows.append(masked_logits(model, ids, star_masks(len(ids), len(context), **sizes))[-1])
        ids.append(int(rows[-1].argmax()))
    return ids[-count:], torch.stack(rows)


def anchored_greedy(model, context, query, count, *, block, anchors):
    """(tokens, logits [count, vocab]) of the answer, where each block has an anchor of its own: its tokens stand before
    the context, see themselves only, and are seen by their block alone.

    Args:
        model: transformers', in float64, with eager attention, of layers that see everything.
        anchors: (ids, positions) of each block's anchor.
    """
    before = [token for ids, _ in anchors for token in ids]
    positions = [position for _, at in anchors for position in at]
    of_block = [number for number, (ids, _) in enumerate(anchors) for _ in ids]
    of_block = torch.tensor([*of_block, *(token // block for token in range(len(context)))])
    ids, rows = [*before, *context, *query], []
    for _ in range(count):
        total, first, last = len(ids), len(before), len(before) + len(context)
        row, column = torch.arange(total)[:, None], torch.arange(total)[None]
        seen = (row >= last) & (column >= first)
        seen[:last, :last] = of_block[:, None] == of_block[None]
        mask = torch.zeros(total, total, dtype=torch.float64).masked_fill(~(seen & (column <= row)), float("-inf"))
        at = torch.tensor([[*positions, *range(total - first)]])
        with torch.no_grad():
            given = {"attention_mask": mask[None, None], "position_ids": at, "use_cache": False}
            rows.append(model(torch.tensor([ids]), **given).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return ids[-count:], torch.stack(rows)
