"""RULER's 13 tasks.

Source: NVIDIA/RULER at commit c3f5e3b: scripts/synthetic.yaml (options), scripts/data/synthetic/constants.py
(templates, answer prefixes, tokens to generate), scripts/eval/synthetic/constants.py (metrics). The star paper's:
NVIDIA/Star-Attention at commit c61059f: ruler/synthetic_task_config.yaml, ruler/synthetic_inference_config.yaml (tokens
to generate), ruler/data/synthetic/constants.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from nemo_star.evaluation.ruler.common_words import CommonWords
from nemo_star.evaluation.ruler.frequent_words import FrequentWords
from nemo_star.evaluation.ruler.niah import Niah
from nemo_star.evaluation.ruler.questions import Questions
from nemo_star.evaluation.ruler.task import RulerTask
from nemo_star.evaluation.ruler.variable_tracking import VariableTracking

_NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
_NIAH_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: "
)
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_QA = f"{_ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{_ONLY}\n\nQuestion: {{query}}"
_QA_PREFIX = " Answer:"


def _options(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType(options)


def _niah(
    name: str, haystack: str, *, keys: str = "words", values: str = "numbers", kvq: tuple[int, int, int]
) -> RulerTask:
    """kvq: keys, values of a key, keys asked for."""
    k, v, q = kvq
    options = _options(haystack=haystack, keys=keys, values=values, num_needle_k=k, num_needle_v=v, num_needle_q=q)
    return RulerTask(name, Niah, options, _NIAH, _NIAH_PREFIX, 128, "all")


_TASKS = (
    _niah("niah_single_1", "noise", kvq=(1, 1, 1)),
    _niah("niah_single_2", "essay", kvq=(1, 1, 1)),
    _niah("niah_single_3", "essay", values="uuids", kvq=(1, 1, 1)),
    _niah("niah_multikey_1", "essay", kvq=(4, 1, 1)),
    _niah("niah_multikey_2", "needle", kvq=(1, 1, 1)),
    _niah("niah_multikey_3", "needle", keys="uuids", values="uuids", kvq=(1, 1, 1)),
    _niah("niah_multivalue", "essay", kvq=(1, 4, 1)),
    _niah("niah_multiquery", "essay", kvq=(1, 1, 4)),
    RulerTask("vt", VariableTracking, _options(num_hops=4), _VT, _VT_PREFIX, 30, "all"),
    RulerTask("cwe", CommonWords, _options(freq_cw=30, freq_ucw=3, num_cw=10), _CWE, _CWE_PREFIX, 120, "all"),
    RulerTask("fwe", FrequentWords, _options(), _FWE, _FWE_PREFIX, 50, "all"),
    RulerTask("qa_1", Questions, _options(dataset="squad"), _QA, _QA_PREFIX, 32, "part"),
    RulerTask("qa_2", Questions, _options(dataset="hotpotqa"), _QA, _QA_PREFIX, 32, "part"),
)


def tasks(*, star_paper: bool = False) -> dict[str, RulerTask]:
    """All by name, in RULER's order.

    Args:
        star_paper: as the code of the Star Attention paper (arXiv 2411.17116) makes and answers them. It searches sizes
            in steps, repeats cwe's words 300 and 30 times, generates 120 tokens for fwe and writes vt's example and
            prefix otherwise; each family's file says how.
    """
    return {task.name: _of_star_paper(task) if star_paper else task for task in _TASKS}


def _of_star_paper(task: RulerTask) -> RulerTask:
    task = replace(task, star_paper=True)
    if task.name == "cwe":
        return replace(task, options=_options(freq_cw=300, freq_ucw=30, num_cw=10))
    if task.name == "fwe":
        return replace(task, tokens_to_generate=120)
    if task.name == "vt":
        return replace(task, answer_prefix=task.answer_prefix.replace("assigned", "assgined"))
    return task
