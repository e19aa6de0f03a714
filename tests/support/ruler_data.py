"""Small files in the formats of RULER's: essays, SQuAD, HotpotQA."""

import json
import random
import re

from nemo_star.evaluation.needles import filler_sentence


def count_words(text):
    return len(re.findall(r"\w+|[^\w\s]", text))


def write_data(folder):
    rng = random.Random(5)
    essays = "\n\n".join(" ".join(filler_sentence(rng) for _ in range(12)) for _ in range(20))
    documents = [[f"Title {number}", _sentences(rng)] for number in range(60)]
    _write(folder / "PaulGrahamEssays.json", {"text": essays})
    _write(folder / "squad.json", {"data": [_article(rng, number) for number in range(12)]})
    _write(folder / "hotpotqa.json", [_hotpot(rng, number, documents) for number in range(12)])


def _write(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")


def _sentences(rng):
    return [" " * (number > 0) + filler_sentence(rng) for number in range(5)]


def _article(rng, number):
    return {"paragraphs": [_paragraph(rng, f"{number} {part}") for part in range(rng.randint(2, 9))]}


def _paragraph(rng, name):
    context = f"Part {name}. " + "".join(_sentences(rng))
    questions = [
        {
            "question": f"What is {name} {kind}?",
            "is_impossible": kind == "impossible",
            "answers": [{"text": word} for word in rng.sample(context.split(), 2)],
        }
        for kind in ("impossible", "possible")
    ]
    return {"context": context, "qas": questions}


def _hotpot(rng, number, documents):
    context = rng.sample(documents, 10)
    return {"question": f"Who is {number}?", "answer": context[3][0], "context": context}
