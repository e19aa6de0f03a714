"""The tool that trains the bundled model: what sequences say, and that training goes on where it was interrupted."""

import json
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "tools"))

from demo_model.maker import Maker
from demo_model.model import HEADS, begin_to_count, build_model, guide_loss, losses
from demo_model.reader import RULER_TASKS, write_ruler_prompts
from demo_model.sequence import Batch, Pieces
from demo_model.tokenizer import EOS, hugging_face_tokenizer, train_tokenizer
from demo_model.training import Stage, Training
from demo_model.words import words
from sentencepiece import SentencePieceProcessor

TASKS = ("needles", "old", "vt", "cwe", "fwe")
STAGES = (
    Stage((192,), {"needles": 1}, 3, 1e-3, tokens=384),
    Stage((512,), dict.fromkeys(TASKS, 1), 2, 1e-3, tokens=1024, skip_to=4096),
)


@pytest.fixture(scope="module")
def pieces():
    tokenizer = SentencePieceProcessor(model_proto=train_tokenizer(0))
    return Pieces(hugging_face_tokenizer(tokenizer, 8192).backend_tokenizer)


def made(pieces, task, length=512, skip_to=0):
    return [
        Maker(pieces, words(kept=False), random.Random(seed), length, skip_to=skip_to).make(task) for seed in range(5)
    ]


def test_kept_words_are_not_trained_on():
    trained, kept = words(kept=False), words(kept=True)
    for of in ("adjectives", "nouns", "verbs"):
        assert not set(getattr(trained, of)) & set(getattr(kept, of))
        assert 0.15 < len(getattr(kept, of)) / len(getattr(trained, of)) < 0.35


@pytest.mark.parametrize("task", TASKS)
def test_a_sequence_has_its_length_and_answers_and_copies_what_it_is_linked_to(pieces, task):
    for sequence in made(pieces, task, skip_to=8192):
        assert len(sequence.ids) == len(sequence.positions) == 512
        assert sequence.positions == sorted(set(sequence.positions))
        assert sequence.positions[-1] < 8192
        assert [EOS] in sequence.answers.values()
        assert all(sequence.ids[place + 1] in tokens for place, tokens in sequence.answers.items())
        text = [sequence.pieces._tokenizer.id_to_token(token) for token in sequence.ids]
        for place, targets in sequence.links.get("source", []):
            copied = {text[target] for target in targets}
            assert copied in ({text[place + 1]}, {"."})  # a number ends where its full stop is
        for place, targets in [link for links in sequence.links.values() for link in links]:
            assert all(target <= place for target in targets)


def test_words_that_are_counted_may_be_said_in_any_order(pieces):
    text = pieces._tokenizer
    for sequence in made(pieces, "cwe", length=2048):
        decoded = text.decode(sequence.ids, skip_special_tokens=True)
        lists = re.findall(
            r"often\.\s+(1\. .*?)\s+Question:.*?in the list are: (1\. .*?)(?=\s+Below|$)", decoded, re.DOTALL
        )
        assert len(lists) in (1, 2)  # the first may be an example
        for listed, answer in lists:
            counts = Counter(re.findall(r"\d\. (\S+)", listed))
            answered = re.findall(r"\d\. (\S+)", answer)
            others = set(counts) - set(answered)
            assert len(set(answered)) == len(answered) == 10
            assert min(counts[word] for word in answered) > max([counts[word] for word in others], default=0)
        said = dict(sequence.links["said"])
        for (place, counted), (next_place, left) in pairwise(sequence.links["count"]):
            if next_place in said:  # a word less is left than before the word before
                assert said[next_place] == [*said.get(place, []), place + 1]
                assert set(sequence.answers[next_place]) <= set(sequence.answers[place])
                others = {sequence.ids[target] for target in left} - {sequence.ids[place + 1]}
                assert others == {sequence.ids[target] for target in counted} - {sequence.ids[place + 1]}


def test_any_of_the_words_that_are_left_is_right(pieces):
    batch = Batch.of(made(pieces, "cwe")[:2])
    model = build_model(1)
    loss, _, right = losses(model, batch)
    logits = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=torch.ones_like(batch.ids)).logits
    lost, hits = [], [[], []]
    for row, number in sorted({(row, number) for row, number, _, _ in batch.answers.tolist()}):
        place, tokens = batch.answers[batch.answers[:, 1] == number][:, 2:].T
        chances = logits[row, place[0]].softmax(-1)
        lost.append(-chances[tokens].sum().log())
        hits[row].append(float(chances.argmax() in tokens))
    assert len(lost) < len(batch.answers)
    assert loss.item() == pytest.approx(torch.stack(lost).mean().item(), rel=1e-4)
    assert right.tolist() == pytest.approx([sum(row) / len(row) for row in hits])


def test_a_chain_is_followed_by_ends_and_offsets(pieces):
    for sequence in made(pieces, "vt"):
        offsets = dict(sequence.links["offset"])
        for place, (end,) in sequence.links["chain"]:
            assert sequence.ids[place + 1] == sequence.ids[offsets[end][0]]  # the letter that is answered


def test_positions_do_not_skip_between_an_assignment_and_where_it_is_read(pieces):
    for sequence in made(pieces, "vt", skip_to=8192):
        for place, (target,) in sequence.links["offset"]:
            assert sequence.positions[place] - sequence.positions[target] == 11


def test_guided_attention_is_compared_with_what_the_model_computes(pieces):
    batch = Batch.of(made(pieces, "needles", length=192))
    model = build_model(1)
    model.set_attn_implementation("eager")
    outputs = model.model(
        input_ids=batch.ids, position_ids=batch.positions, output_hidden_states=True, output_attentions=True
    )
    layer, head = HEADS["gather"]
    attention, links = outputs.attentions[layer][:, head], batch.links["gather"]
    divergences = []
    for row, number in sorted({(row, number) for row, number, _, _ in links.tolist()}):
        at, targets = links[(links[:, 0] == row) & (links[:, 1] == number)][:, 2:].T
        even = torch.full((len(targets),), 1 / len(targets))
        divergences.append((even * (even / attention[row, at[0], targets]).log()).sum())
    found = guide_loss(model, "gather", outputs.hidden_states[layer], batch.positions, links)
    assert found.item() == pytest.approx(torch.stack(divergences).mean().item(), rel=1e-4)
    assert losses(model, batch)[1]["gather"].item() == pytest.approx(found.item(), rel=1e-3)


def test_a_head_matches_from_the_start_what_another_has_gathered():
    """Whatever else stands at the two places."""
    model = build_model(1)
    (gathering, gather), (matching, match) = HEADS["gather"], HEADS["source"]
    size = model.config.head_dim
    writes = model.model.layers[gathering].self_attn.o_proj.weight[:, gather * size :][:, :size]
    block = model.model.layers[matching]
    reads = [block.self_attn.q_proj.weight[match * size :][:size], block.self_attn.k_proj.weight[:size]]
    gathered, asked = torch.randn(64, size), torch.arange(64)
    embedded = model.model.embed_tokens.weight[torch.randint(0, 2048, (2, 64))]
    states = block.input_layernorm(embedded + 0.3 * gathered @ writes.T)
    queries, keys = (state @ weight.T for state, weight in zip(states, reads, strict=True))
    assert torch.equal((queries @ keys.T).argmax(-1), asked)


def test_a_head_that_begins_to_count_looks_away_from_what_is_said():
    model = build_model(1)
    begin_to_count(model)
    (carrying, said), (counting, count), size = HEADS["said"], HEADS["count"], model.config.head_dim
    words = model.model.embed_tokens.weight[torch.randperm(2048)[:64]]
    layer, block = model.model.layers[carrying], model.model.layers[counting]
    values = layer.input_layernorm(words) @ layer.self_attn.v_proj.weight[size:].T
    carried = values @ layer.self_attn.o_proj.weight[:, said * size :][:, :size].T
    queries = block.input_layernorm(words.roll(1, 0) + carried) @ block.self_attn.q_proj.weight[count * size :][:size].T
    keys = block.input_layernorm(words) @ block.self_attn.k_proj.weight[size:].T
    scores = queries @ keys.T / size**0.5
    others = (scores.sum(-1) - scores.diag()) / 63
    assert (others - scores.diag()).mean() > 0.5


def test_counting_starts_from_a_model_that_retrieves(pieces, tmp_path):
    before = build_model(7)
    before.save_pretrained(tmp_path / "retrieves")
    after = Training(tmp_path, STAGES, pieces, seed=3, count_from=tmp_path / "retrieves").model.state_dict()
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    parts = {"said": "o_proj", "count": "q_proj"}
    assert changed == {f"model.layers.{HEADS[role][0]}.self_attn.{part}.weight" for role, part in parts.items()}


def test_prompts_to_measure_with_are_of_kept_words(pieces, tmp_path):
    def count(text):
        return len(pieces.of(text, new_line=False)[0])

    write_ruler_prompts(tmp_path / "prompts.jsonl", count, [2048], 2, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert Counter(row["task"] for row in rows) == dict.fromkeys(RULER_TASKS, 2)
    assert all(1000 < count(row["context"] + row["query"]) < 2048 for row in rows)
    kept = words(kept=True)
    listed = {word for row in rows if row["task"] == "cwe" for word in re.findall(r"\d\. (\S+)", row["context"])}
    assert len(listed) > 50
    assert listed <= {*kept.nouns, *kept.adjectives, *kept.verbs}
    keys = {key for row in rows if "niah" in row["task"] for key in re.findall(r"for (\S+) is:", row["context"])}
    assert len(keys) > 50
    assert keys <= {f"{adjective}-{noun}" for adjective in kept.adjectives for noun in kept.nouns}


def test_training_that_is_interrupted_gives_the_same_weights(pieces, tmp_path):
    def trained(folder, seconds):
        folder.mkdir(exist_ok=True)
        while not (training := Training(folder, STAGES, pieces, seed=3)).run(seconds):
            pass
        return training.model.state_dict()

    whole, parts = trained(tmp_path / "whole", 1e9), trained(tmp_path / "parts", 0)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
