"""Sentences of an essay, without a trained model."""

from __future__ import annotations

import re

_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")
_TITLE = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|Inc|Co|Jr|Sr)|\b[A-Z]|\b[ap]\.m|\b[ie]\.[eg])\.$")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text whose white space is single spaces; joined with spaces they are the text.

    RULER takes NLTK's `sent_tokenize`, whose Punkt model has to be downloaded. Here a sentence ends at ``.``, ``!`` or
    ``?`` before a capital or a digit, common abbreviations and initials excepted. Needles are put between sentences,
    so that a needle's place can differ by a few of them; the haystack's text is the same.
    """
    sentences, start = [], 0
    for match in _END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        if _TITLE.search(text, start, match.start()):
            continue
        sentences.append(text[start:end])
        start = match.end()
    sentences.append(text[start:])
    return [sentence for sentence in sentences if sentence]
