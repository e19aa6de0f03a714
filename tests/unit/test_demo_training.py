"""The tool that trains the bundled model: what sequences say, and that training goes on where it was interrupted."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "tools"))

from demo_model.maker import Maker
from demo_model.model import HEADS, build_model, guide_loss, losses
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
        predicted = dict(sequence.answers)
        assert EOS in predicted.values()
        assert all(predicted[place] == sequence.ids[place + 1] for place in predicted)
        text = [sequence.pieces._tokenizer.id_to_token(token) for token in sequence.ids]
        for place, targets in sequence.links.get("source", []):
            copied = {text[target] for target in targets}
            assert copied in ({text[place + 1]}, {"."})  # a number ends where its full stop is
        for place, targets in [link for links in sequence.links.values() for link in links]:
            assert all(target <= place for target in targets)


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


def test_training_that_is_interrupted_gives_the_same_weights(pieces, tmp_path):
    def trained(folder, seconds):
        folder.mkdir(exist_ok=True)
        while not (training := Training(folder, STAGES, pieces, seed=3)).run(seconds):
            pass
        return training.model.state_dict()

    whole, parts = trained(tmp_path / "whole", 1e9), trained(tmp_path / "parts", 0)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
