"""What a demo model is measured with: questions about documents of our own, and prompts of RULER with unseen words."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.tokenizer import BOS, EOS
from demo_model.words import words
from nemo_star.evaluation.needles import NeedleDocument, fit_document, question
from nemo_star.evaluation.ruler.catalog import tasks
from nemo_star.evaluation.ruler.common_words import CommonWords
from nemo_star.evaluation.ruler.niah import Niah
from nemo_star.evaluation.ruler.sources import WordPairs
from nemo_star.evaluation.task import Family, Setting

QUESTION_ROOM = 64
"""Tokens left free behind a document, for the question and its answer."""
NEEDLES_EVALUATED = (1, 4, 8)
RULER_TASKS = ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe")
"""Those with formats that training knows and without files from elsewhere."""


class DenseReader:
    """Answers questions about documents with a saved checkpoint and ordinary dense attention."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def document(self, rng: random.Random, needles: int, tokens: int) -> NeedleDocument:
        """A fresh document of at most `tokens` tokens with its BOS."""
        return fit_document(rng, tokens=tokens - 1, needles=needles, count_tokens=lambda text: len(self.ids(text)))

    @torch.inference_mode()
    def answers_exactly(self, document: NeedleDocument, key: str) -> bool:
        """Whether greedy decoding gives the seven digits and then EOS.

        It does if and only if, given the right answer, each next token is the likeliest, which one pass tells.
        """
        answer = [*self.ids(document.needles[key]), EOS]
        ids = torch.tensor([[BOS, *self.ids(document.text), *self.ids(question(key)), *answer]])
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
        return logits[0, :-1].argmax(-1).tolist() == answer


def evaluate(reader: DenseReader, lengths: list[int], documents: int) -> None:
    """Print how many of `documents` fresh documents of each kind have their question answered exactly."""
    print("| tokens | " + " | ".join(f"{needles} needle{'s' * (needles > 1)}" for needles in NEEDLES_EVALUATED) + " |")
    print("|---:" * (1 + len(NEEDLES_EVALUATED)) + "|")
    for length in lengths:
        cells = []
        for needles in NEEDLES_EVALUATED:
            right = 0
            for index in range(documents):
                rng = random.Random(f"evaluation-{length}-{needles}-{index}")  # training seeds never look like this
                document = reader.document(rng, needles, length - QUESTION_ROOM)
                right += reader.answers_exactly(document, rng.choice(list(document.needles)))
            cells.append(f"{right} of {documents}")
            print(f"{length} tokens, {needles} needle(s): {cells[-1]}", file=sys.stderr)
        print(f"| {length} | " + " | ".join(cells) + " |", flush=True)


def write_demo_document(reader: DenseReader, target: Path, length: int) -> None:
    """Write the first document with a needle in its third quarter that is answered right; print that question."""
    for attempt in range(100):
        document = reader.document(random.Random(f"demo-{attempt}"), 4, length - QUESTION_ROOM)
        text = document.text
        for key, value in document.needles.items():
            depth = len(reader.ids(text[: text.index(f" {key} ")])) / len(reader.ids(text))
            if 0.5 < depth < 0.75 and reader.answers_exactly(document, key):
                target.write_text(text, encoding="utf-8")
                print(f"{1 + len(reader.ids(text))} tokens with BOS; asked for at {depth:.0%}: {question(key)} {value}")
                return
    raise RuntimeError("no demo document is answered right")


def write_ruler_prompts(
    target: Path, count_tokens: Callable[[str], int], lengths: list[int], samples: int, seed: int
) -> None:
    """Prompts of RULER's generators whose words training never saw, for `tools/evaluate.py input=FILE`."""
    with target.open("w", encoding="utf-8") as file:
        for length in lengths:
            for name in RULER_TASKS:
                family = _with_kept_words(name, Setting(length, seed, count_tokens, None))
                for number, prompt in enumerate(family.prompts(samples)):
                    line = {
                        "id": f"{name}-{length}-{number}",
                        "task": name,
                        "context": prompt.context,
                        "query": prompt.query,
                        "outputs": prompt.outputs,
                    }
                    file.write(json.dumps(line) + "\n")


def _with_kept_words(name: str, setting: Setting) -> Family:
    task, kept = tasks()[name], words(kept=True)
    family = task.family(task, setting)
    if isinstance(family, Niah):
        family.pairs = WordPairs(kept.adjectives, kept.nouns)
    elif isinstance(family, CommonWords):
        family.words = sorted({*kept.nouns, *kept.adjectives, *kept.verbs})
        family.probe = min(family.probe, len(family.words))
    return family
