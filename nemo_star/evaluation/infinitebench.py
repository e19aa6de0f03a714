"""InfiniteBench (arXiv 2402.13718): passkey, number_string and kv_retrieval, at any length.

Source: OpenBMB/InfiniteBench at commit 88b3daa (MIT): data/construct_synthetic_dataset.py, src/prompt.py (the templates
of its open models, `yarn_mistral_templates`), src/eval_utils.py (tokens to generate); kv's records are those of
nelson-liu/lost-in-the-middle at commit 70fcd76 (MIT), scripts/make_kv_retrieval_data.py.

Prompts are equal to these for the same seed, haystack and number of samples. Unlike there: the haystack is as long as
the target allows (there: 128 thousand tokens), and each length starts from the seed; a depth has as many samples as
there (passkey 5, number_string 10) only where there are enough for 55 depths; kv has no more records than are shown
(there: 2,500 of 3,000), with uuids of the seed.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from types import MappingProxyType

from nemo_star.evaluation.ruler.niah import NOISE
from nemo_star.evaluation.task import Filled, Prompt, Setting, Task, framed

DIGITS = 5
MIN_DEPTHS = 55
"""Before samples are at the same depth."""


class Hidden(Filled):
    """A number in noise. Size: repetitions of the noise, 25 tokens each: targets of 2,500 tokens are met within 1%."""

    guess = 200

    def sample(self, index: int, count: int) -> Callable[[int], Prompt]:
        repeats = min(self.task.options["repeats"], -(-count // MIN_DEPTHS))
        key = self._key()
        depth, depths = index // repeats, -(-count // repeats)

        def of_size(size: int) -> Prompt:
            before = depth * (size // max(depths - 1, 1))
            needle = self.task.options["needle"].format(key=key)
            noise = f"{NOISE}\n"
            return framed(self.task.head(), noise * before + needle + noise * (size - before), self.task.tail(), [key])

        return of_size

    def _key(self) -> str:
        digits = [str(self.rng.randint(0, 9)) for _ in range(DIGITS)]
        for number in range(self.task.options["repeated_digits"]):
            place = self.rng.randint(0, DIGITS + number - 1)
            digits.insert(place, digits[place])
        return "".join(digits)


class KeyValue(Filled):
    """The value of a key in a JSON object of uuids. Size: records."""

    smallest = 1

    def __init__(self, task: Task, setting: Setting) -> None:
        super().__init__(task, setting)
        self.shuffling = self.same_seed()

    def prompts(self, count: int) -> Iterator[Prompt]:
        """Of as many records as fit in a first try with other random numbers; of fewer where these do not fit."""
        tried = random.Random(f"{self.setting.seed} records")
        records: list[tuple[str, str]] = []

        def of_size(size: int) -> Prompt:
            records.extend(_record(tried) for _ in range(size - len(records)))
            return self._prompt(records[:size], 0)

        self.guess = self.most = self.filled(of_size, self.guess)[0]
        return super().prompts(count)

    def sample(self, index: int, count: int) -> Callable[[int], Prompt]:
        assert self.most is not None, "prompts finds it"
        records = [_record(self.rng) for _ in range(self.most)]
        self.rng.choice(records)  # lost-in-the-middle draws a key; InfiniteBench asks for another one
        self.shuffling.shuffle(records)
        return lambda size: self._prompt(records[:size], index * size // count)

    def _prompt(self, records: list[tuple[str, str]], asked: int) -> Prompt:
        listed = ", ".join(f'"{key}": "{value}"' for key, value in records)
        key, value = records[asked]
        return framed(self.task.head(), f"JSON data:\n{{{listed}}}", self.task.tail().format(key=key), [value])


def _record(rng: random.Random) -> tuple[str, str]:
    """Key and value; the value is drawn first."""
    value, key = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)]
    return key, value


_INFO = "There is an important info hidden inside a lot of irrelevant text. Find it"
_PASSKEY = f"{_INFO} and memorize it. I will quiz you about the important information.\n\n{{context}}\n\n"
_NUMBER = f"{_INFO}. I will quiz you about the important information there.\n\n{{context}}\n\n"
_KV = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n"
    '\nKey: "{key}"\nThe value associated with the specified key is: '
)


def tasks() -> dict[str, Task]:
    """All by name."""
    passkey = {
        "needle": "The pass key is {key}. Remember it. {key} is the pass key.\n",
        "repeated_digits": 0,
        "repeats": 5,
    }
    number = {
        "needle": "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n",
        "repeated_digits": 5,
        "repeats": 10,
    }
    made = [
        Task(
            "passkey",
            Hidden,
            MappingProxyType(passkey),
            f"{_PASSKEY}What is the pass key?",
            "\n\nThe pass key is",
            6,
            "first_number",
        ),
        Task(
            "number_string",
            Hidden,
            MappingProxyType(number),
            f"{_NUMBER}What is the sequence of digits?",
            "\n\nThe sequence of digits is",
            12,
            "first_number",
        ),
        Task("kv_retrieval", KeyValue, MappingProxyType({}), _KV, "", 50, "one_word"),
    ]
    return {task.name: task for task in made}
