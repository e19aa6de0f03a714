"""The demo model, and what it is trained on: its answers, and the attention of a few heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demo_model.sequence import Batch
from demo_model.tokenizer import BOS, EOS, VOCABULARY

MAX_POSITIONS = 8192
ROPE_THETA = 1e12
HEADS = {"gather": (1, 0), "offset": (1, 2), "source": (2, 0), "chain": (2, 2), "said": (1, 3), "count": (2, 3)}
"""Role -> layer and head that is guided."""


_FREE = slice(128, 256)
"""Channels that embeddings leave free: what the gathering head finds is written there, and nothing else at first."""
_SLOW = slice(24, 64)
"""Pairs of a head's channels that rotate by less than a radian over 8,192 tokens."""
_LOOK_AWAY = 8.0
"""How much less, in the exponent, a head that begins to count attends to a word that is all that was said."""


def build_model(seed: int) -> LlamaForCausalLM:
    """A model whose heads start as matching (queries equal keys) and copying (outputs are transposed values)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    group = config.num_attention_heads // config.num_key_value_heads
    heads = (config.num_key_value_heads, config.head_dim, config.hidden_size)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(40.0)
        model.model.embed_tokens.weight[:, _FREE] = 0.0
        model.model.norm.weight.fill_(0.03)  # else the large embeddings, tied to the outputs, made logits too large
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(0.3)
            attention = layer.self_attn
            keys, values = attention.k_proj.weight.view(heads), attention.v_proj.weight.view(heads)
            values[:, :, _FREE] = 0.0
            if number == HEADS["source"][0]:
                _read_what_is_gathered(keys)
            attention.q_proj.weight.copy_(keys.repeat_interleave(group, dim=0).flatten(0, 1))
            attention.o_proj.weight.copy_(
                (1.0 if number == HEADS["source"][0] else 0.3) * values.repeat_interleave(group, dim=0).flatten(0, 1).T
            )
        layer, head = HEADS["gather"]
        written = model.model.layers[layer].self_attn.o_proj.weight[:, head * config.head_dim :][:, : config.head_dim]
        written.zero_()
        written[_FREE] = 8.0 * torch.eye(config.head_dim)
    return model


def _read_what_is_gathered(keys: Tensor) -> None:
    """Let heads match by it, over any distance; keys [groups, head_dim, hidden] of a layer."""
    for of_group in keys:
        slow = torch.cat((of_group[_SLOW], of_group[64:][_SLOW]))
        read = torch.linalg.qr(torch.randn(128, len(slow))).Q.T
        slow[:, _FREE] = read
        of_group[_SLOW], of_group[64:][_SLOW] = slow.chunk(2)


def begin_to_count(model: LlamaForCausalLM) -> None:
    """Two heads that have not learned to do so yet: one carries the words that are said already to where the next one
    is said; the head that counts, a layer later, looks away from what is like them, at any distance."""
    (layer, said), (counting, count), size = HEADS["said"], HEADS["count"], model.config.head_dim
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        embedded = model.model.embed_tokens.weight
        values = attention.v_proj.weight[said // group * size :][:size]
        scale = embedded.square().mean().sqrt()
        attention.o_proj.weight[:, said * size :][:, :size] = scale * torch.linalg.pinv(values)
        block = model.model.layers[counting]
        of_slow = torch.tensor([*range(_SLOW.start, _SLOW.stop), *range(64 + _SLOW.start, 64 + _SLOW.stop)])
        keys = block.self_attn.k_proj.weight[count // group * size :][:size][of_slow]
        alike = F.linear(block.input_layernorm(embedded), keys).square().sum(-1).mean() / size**0.5
        block.self_attn.q_proj.weight[count * size + of_slow] -= _LOOK_AWAY / alike * keys


def guide_loss(model: LlamaForCausalLM, role: str, states: Tensor, positions: Tensor, links: Tensor) -> Tensor:
    """How far the attention of the role's head is from even attention to the targets of each place: their mean KL.

    Args:
        states: [b, s, h], what the layer reads.
        links: as in `Batch.links`.
    """
    layer, head = HEADS[role]
    block, size = model.model.layers[layer], model.config.head_dim
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    states = block.input_layernorm(states)
    attention = block.self_attn
    queries = F.linear(states, attention.q_proj.weight[head * size : (head + 1) * size])[:, None]
    of_group = head // group
    keys = F.linear(states, attention.k_proj.weight[of_group * size : (of_group + 1) * size])[:, None]
    queries, keys = apply_rotary_pos_emb(queries, keys, *model.model.rotary_emb(states, positions))
    total, places = states.new_zeros(()), 0
    for row in range(len(states)):
        _, numbers, at, targets = links[links[:, 0] == row].T
        if not len(numbers):
            continue
        unique, inverse, counts = torch.unique_consecutive(numbers, return_inverse=True, return_counts=True)
        first = torch.cumsum(counts, 0) - counts
        at = at[first]
        scores = queries[row, 0, at] @ keys[row, 0].T / size**0.5
        scores = scores.masked_fill(torch.arange(states.shape[1]) > at[:, None], -torch.inf)
        logs = scores - scores.logsumexp(-1, keepdim=True)
        weights = 1 / counts[inverse]
        total = total - (logs[inverse, targets] * weights).sum() - (counts.log()).sum()
        places += len(unique)
    return total / max(1, places)


def _carried_loss(model: LlamaForCausalLM, states: Tensor, batch: Batch) -> Tensor:
    """Whether the head has told the letter it is guided to: what the model would predict after that layer."""
    row, _, place, target = batch.links["offset"].T
    return F.cross_entropy(model.lm_head(model.model.norm(states[row, place])), batch.ids[row, target])


def _copied_loss(model: LlamaForCausalLM, role: str, states: Tensor, batch: Batch) -> Tensor:
    """Whether what a head copies is what is answered (of what is counted: what is there): what the model would predict
    from it and from what stands at the place already, over which it has to prevail."""
    (layer, head), size = HEADS[role], model.config.head_dim
    block, attention = model.model.layers[layer], model.model.layers[layer].self_attn
    group = head // (model.config.num_attention_heads // model.config.num_key_value_heads)
    row, _, place, target = batch.links[role].T
    values = F.linear(block.input_layernorm(states[row, target]), attention.v_proj.weight[group * size :][:size])
    outputs = F.linear(values, attention.o_proj.weight[:, head * size :][:, :size])
    copied = target if role == "count" else place + 1
    return F.cross_entropy(model.lm_head(model.model.norm(states[row, place] + outputs)), batch.ids[row, copied])


def _lost(logits: Tensor, may_follow: Tensor) -> Tensor:
    """Mean cross entropy where any of several tokens is right; logits and may_follow [places, vocab]."""
    return (logits.logsumexp(-1) - logits.masked_fill(~may_follow, -torch.inf).logsumexp(-1)).mean()


def losses(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss of the answers, loss of each guided head, answers right by row [b])"""
    outputs = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=torch.ones_like(batch.ids),  # else transformers takes skipped positions for packed sequences
        use_cache=False,
        output_hidden_states=True,
    )
    _, numbers, _, tokens = batch.answers.T
    rows, _, places, _ = batch.answers[numbers.diff(prepend=numbers.new_tensor([-1])) > 0].T
    logits = model.lm_head(outputs.last_hidden_state[rows, places])
    may_follow = torch.zeros_like(logits, dtype=torch.bool)
    may_follow[numbers, tokens] = True
    right = may_follow.gather(1, logits.argmax(-1, keepdim=True))[:, 0].float()
    guides = {
        role: guide_loss(model, role, outputs.hidden_states[HEADS[role][0]], batch.positions, links)
        for role, links in batch.links.items()
    }
    if "offset" in batch.links:
        guides["carried"] = _carried_loss(model, outputs.hidden_states[HEADS["offset"][0] + 1], batch)
    for role in {"source", "chain", "count"} & set(batch.links):
        guides[f"copied {role}"] = _copied_loss(model, role, outputs.hidden_states[HEADS[role][0]], batch)
    if "count" in batch.links:
        counts = torch.zeros_like(batch.ids, dtype=torch.bool)
        counts[batch.links["count"][:, 0], batch.links["count"][:, 2]] = True
        here = counts[rows, places]
        states = outputs.hidden_states[HEADS["count"][0] + 1][rows[here], places[here]]
        guides["left"] = _lost(model.lm_head(model.model.norm(states)), may_follow[here])  # is it known in that layer?
    return _lost(logits, may_follow), guides, torch.bincount(rows, right) / torch.bincount(rows)
