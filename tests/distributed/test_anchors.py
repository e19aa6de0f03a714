"""What else may stand before a block, the paper's ablation, a summary and what blocks overlap with: against
transformers, in float64, with these tokens put before each block by hand."""

import math
from collections import Counter

import pytest
import torch
from family_models import SIZES, save_model, tokens
from launch import generate_many, read_jsonl, selected, write_jsonl
from safetensors.torch import load_file
from star_masks import anchored_greedy, star_greedy

from nemo_star.attention.star import StarAttention
from nemo_star.checkpoint.convert import import_checkpoint
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of

CONTEXT, QUERY, STEPS, FAMILY = 61, 5, 3, "llama-yarn"
CP1, CP2, TP2, PP2 = (1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2)
"""(tp, cp, pp); on two ranks, what remains is data parallel."""
SUMMARIES = {
    "one chunk a block": (16, 16, 4, 4),
    "fewer chunks than blocks": (16, 12, 3, 4),
    "a short last block": (25, 19, 2, 5),
    "no sink": (20, 16, 0, 3),
    "a sink alone": (16, 5, 5, 8),
    "one block": (CONTEXT, 20, 4, 4),
}
"""Name -> block, anchor, sink and chunk size."""


QUICK = {
    "published: first": (("star", "first", "first"), CP2),
    "random positions": (("star", "first", "random"), CP2),
    "random positions, one rank": (("star", "first", "random"), CP1),
    "previous block": (("star", "previous", "previous"), CP2),
    "constant": (("star", "constant", "first"), CP2),
    "random": (("star", "random", "first"), CP2),
    "shuffled": (("star", "shuffled", "first"), CP2),
    "overlap": (("overlap", 5, "shared"), CP2),
    "overlap, recomputed": (("overlap", 12, "recompute"), CP2),
    "overlap, one rank": (("overlap", 12, "shared"), CP1),
    "overlap, tensor parallel": (("overlap", 5, "shared"), TP2),
    "overlap, two stages": (("overlap", 5, "recompute"), PP2),
    "summary": (("summary", "a short last block"), CP2),
    "summary, one rank": (("summary", "a short last block"), CP1),
    "summary, two stages": (("summary", "a short last block"), PP2),
}
SLOW = {
    f"{content}, {positions}, {layout}": (("star", content, positions), layout)
    for content in ("first", "previous", "constant", "random", "shuffled")
    for positions in ("first", "previous", "random")
    for layout in (CP1, CP2)
} | {f"{name}, {layout}": (("summary", name), layout) for name in SUMMARIES for layout in (CP1, CP2, TP2)}
SLOW |= {
    f"overlap {size}, {anchor}, {layout}": (("overlap", size, anchor), layout)
    for size in (1, 5, 12, 16)
    for anchor in ("shared", "recompute")
    for layout in (CP1, CP2, TP2, PP2)
}
RUNS = QUICK | {name: run for name, run in SLOW.items() if run not in QUICK.values()}
"""Name -> what stands in the anchor's place, and the layout."""
STAR_SIZES = (16, 7)
"""Block and anchor."""


def settings(case):
    if case[0] == "summary":
        block, anchor, sink, chunk = SUMMARIES[case[1]]
        return {
            "kind": "summary",
            "block_size": block,
            "anchor_size": anchor,
            "sink_size": sink,
            "chunk_size": chunk,
        }
    sizes = dict(zip(("block_size", "anchor_size"), STAR_SIZES, strict=True))
    if case[0] == "overlap":
        return {"kind": "star", **sizes, "overlap_size": case[1], "anchor": case[2]}
    return {"kind": "star", **sizes, "anchor": "recompute", "anchor_content": case[1], "anchor_positions": case[2]}


def star_anchors(context, content, positions):
    """Of each block, by hand; what is drawn comes from the package."""
    block, size = STAR_SIZES
    method = method_of(AttentionConfig(**settings(("star", content, positions))))
    first = context[:size]
    anchors = [((), ())]
    for of_rank in method.partition(CONTEXT, 1).ranks:
        for each in of_rank[1:]:
            start = each.index * block
            inputs = StarAttention.inputs(method, each, torch.tensor(context).int(), SIZES["vocab_size"])
            drawn, at = (tensor[:size].tolist() for tensor in inputs)
            ids = {
                "first": first,
                "previous": context[start - size : start],
                "constant": [min(first, key=lambda token: (-first.count(token), token))] * size,
                "random": drawn,
                "shuffled": drawn,
            }[content]
            anchors.append(
                (ids, {"first": range(size), "previous": range(start - size, start), "random": at}[positions])
            )
    return anchors


def overlap_anchors(context, overlap, anchor):
    """Of each block: the anchor, and what of the tokens right before the block is none of it."""
    block, size = STAR_SIZES
    before = [[]]
    for start in range(block, CONTEXT, block):
        before.append([*range(size), *range(max(size, start - overlap), start)])
    return [([context[place] for place in places], places) for places in before]


def summary_anchors(context, name):
    """Of each block: the sink and the chosen chunks, as far as they lie before it; chosen one chunk at a time."""
    block, size, sink, chunk = SUMMARIES[name]
    blocks = -(-CONTEXT // block)
    starts = {
        number: [
            start
            for start in range(max(number * block, sink), CONTEXT, chunk)
            if start + chunk <= min(CONTEXT, (number + 1) * block)
        ]
        for number in range(blocks)
    }
    every = [start for of_block in starts.values() for start in of_block]
    documents = Counter(token for start in every for token in set(context[start : start + chunk]))

    def goodness(start):
        rarities = [math.log(len(every) / documents[token]) for token in set(context[start : start + chunk])]
        return round(max(rarities), 6), round(sum(rarities), 6)

    budget = (size - sink) // chunk
    chosen = list(range(sink))
    for number in range(blocks - 1):
        share = math.ceil(budget * (number + 1) / (blocks - 1)) - math.ceil(budget * number / (blocks - 1))
        best = sorted(starts[number], key=goodness, reverse=True)[:share]
        chosen += [token for start in sorted(best) for token in range(start, start + chunk)]
    anchors = [((), ())]
    for number in range(1, blocks):
        at = [position for position in chosen if position < number * block]
        anchors.append(([context[position] for position in at], at))
    return anchors


@pytest.fixture(scope="module")
def done(request, tmp_path_factory):
    """By name of a run: what became of it, its line, its logits. And by case (tokens, logits) of transformers."""
    folder = tmp_path_factory.mktemp("anchors")
    context, query = tokens(CONTEXT, seed=7), tokens(QUERY, seed=8)
    context[17:40:3] = context[1:9]  # tokens of several blocks
    write_jsonl(folder / "in.jsonl", [{"id": "a", "context_ids": context, "query_ids": query}])
    model = save_model(folder / "hf", FAMILY).double()
    import_checkpoint(folder / "hf", folder / "converted")
    names = sorted(selected(request, "name"))
    runs = [arguments(folder, number, *RUNS[name]) for number, name in enumerate(names)]
    results = {}
    for number, result in enumerate(generate_many(2, runs, folder)):
        assert result["code"] == 0, f"{names[number]}: {result['error']}"
        logits = load_file(folder / f"{number}.safetensors")["a/logits"]
        results[names[number]] = read_jsonl(folder / f"{number}.jsonl")[0], logits
    expected = {}
    for case in dict.fromkeys(RUNS[name][0] for name in names):
        by_hand = {"star": star_anchors, "overlap": overlap_anchors, "summary": summary_anchors}
        anchors = by_hand[case[0]](context, *case[1:])
        block = settings(case)["block_size"]
        expected[case] = anchored_greedy(model, context, query, STEPS, block=block, anchors=anchors)
        if case == ("star", "first", "first"):
            plain = star_greedy(model, context, query, STEPS, block=STAR_SIZES[0], anchor=STAR_SIZES[1])
            torch.testing.assert_close(expected[case][1], plain[1], atol=1e-5, rtol=0)
    return results, expected


def arguments(folder, number, case, layout):
    tp, cp, pp = layout
    return [
        f"checkpoint={folder / 'converted'}",
        f"input={folder / 'in.jsonl'}",
        f"output={folder / str(number)}.jsonl",
        f"output_logits={folder / str(number)}.safetensors",
        *(f"attention.{key}={value}" for key, value in settings(case).items()),
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.context_parallel_size={cp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"inference.tokens_to_generate={STEPS}",
        "inference.ignore_eos=true",
    ]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_logits_and_tokens_are_those_of_anchors_put_before_each_block(done, name):
    results, expected = done
    line, logits = results[name]
    token_ids, theirs = expected[RUNS[name][0]]
    assert float((logits.double() - theirs).abs().max()) <= 5e-4
    assert line["token_ids"] == token_ids


def test_no_anchor_can_be_taken_for_another(done):
    _, expected = done
    first = [logits[0] for case, (_, logits) in expected.items() if case[-1] != "recompute"]  # as where it is shared
    apart = [float((one - other).abs().max()) for i, one in enumerate(first) for other in first[:i]]
    assert min(apart) > 5e-3
