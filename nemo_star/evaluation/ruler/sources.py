"""Words of the package wonderwords, and files that RULER's scripts download."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from nemo_star.evaluation.data_files import DataFile, Part

Kind = Literal["noun", "adjective", "verb"]

_REPOSITORY = "github.com/NVIDIA/RULER, scripts/data/synthetic/json/"
_FILES = {
    name: DataFile(name, content, f"{_REPOSITORY}: {source}")
    for name, content, source in (
        ("PaulGrahamEssays.json", '{"text": all essays}', "download_paulgraham_essay.py there writes it"),
        (
            "squad.json",
            "SQuAD 2.0's development set",
            "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json, by download_qa_dataset.sh there",
        ),
        (
            "hotpotqa.json",
            "HotpotQA's development set, distractor setting",
            "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json, by download_qa_dataset.sh there",
        ),
        ("english_words.json", "{number: word}, for haystacks of more words than wonderwords has", "it lies there"),
    )
}


def read_data(folder: Path | None, name: str, take: Callable[[Any], Part]) -> Part:
    """What `take` takes from a JSON file of the folder `data`.

    Raises:
        ValueError: the file is missing, or has not the format of its source; says where RULER has it from.
    """
    return _FILES[name].read(folder, lambda text: take(json.loads(text)))


def word_list(kind: Kind) -> list[str]:
    """Words of wonderwords, in the order of its file."""
    try:
        folder = files("wonderwords.assets")
    except ModuleNotFoundError as error:
        raise ValueError("RULER's words are those of the package wonderwords: pip install 'nemo-star[eval]'") from error
    return [line.rstrip() for line in (folder / f"{kind}list.txt").read_text(encoding="utf-8").splitlines()]


class WordPairs:
    """All "adjective-noun" in alphabetical order, each once, without the millions of them in memory.

    Pairs that share what is before their first dash stand together in this order. Where one adjective alone begins so,
    they are its nouns; where several do, their pairs are sorted.
    """

    def __init__(self, adjectives: list[str], nouns: list[str]) -> None:
        self._nouns = sorted(set(nouns))
        by_prefix: dict[str, list[str]] = {}
        for adjective in set(adjectives):
            by_prefix.setdefault(adjective.partition("-")[0] + "-", []).append(adjective)
        self._adjectives = [by_prefix[prefix] for prefix in sorted(by_prefix)]
        self._mixed = {
            number: sorted({f"{adjective}-{noun}" for adjective in group for noun in self._nouns})
            for number, group in enumerate(self._adjectives)
            if len(group) > 1
        }
        sizes = [len(self._mixed.get(number, self._nouns)) for number in range(len(self._adjectives))]
        self._starts = list(accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        offset = index - self._starts[number]
        if number in self._mixed:
            return self._mixed[number][offset]
        return f"{self._adjectives[number][0]}-{self._nouns[offset]}"
