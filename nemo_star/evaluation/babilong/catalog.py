"""BABILong's prompts of qa1 to qa5.

Source: booydar/babilong at commit 7a6efee (Apache 2.0): babilong/prompts.py (to the letter, with its default template),
babilong/metrics.py (labels), scripts/run_model_on_babilong.py (tokens to generate).
"""

from __future__ import annotations

from types import MappingProxyType

from nemo_star.evaluation.babilong.family import BabiLong
from nemo_star.evaluation.task import Task

_TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{{context}}\n</context>\n\nQuestion: {{question}}"
)
_ONE_WORD = "Your answer should contain only one word"
_CARRIED = (
    "You need to answer the question based only on the information from the facts.\n"
    "If a person got an item in the first location and travelled to the second location the item is also in the second "
    "location. If a person dropped an item in the first location and moved to the second location the item remains in "
    "the first location."
)


def _examples(*examples: str, between: str = "\n") -> str:
    return between.join(f"<example>\n{example}\n</example>" for example in examples)


_QA1 = _TEMPLATE.format(
    instruction="I will give you context with the facts about positions of different persons hidden in some random "
    "text and a question. You need to answer the question based only on the information from the facts. If a person "
    "was in different locations, use the latest location to answer the question.",
    examples=_examples(
        "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. "
        "Where is Charlie?\nAnswer: The most recent location of Charlie is balcony.",
        "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to balcony. "
        "Where is Alan?\nAnswer: The most recent location of Alan is shop.",
        between="\n\n",
    ),
    post_prompt="Always return your answer in the following format: The most recent location of ’person’ is "
    "’location’. Do not write anything else after that.",
)
_QA2 = _TEMPLATE.format(
    instruction="I give you context with the facts about locations and actions of different persons hidden in some "
    "random text and a question." + _CARRIED,
    examples=_examples(
        "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the bottle?\n"
        "Answer: The bottle is in the balcony.",
        "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw driver?\n"
        "Answer: The screw driver is in the kitchen.",
    ),
    post_prompt="Always return your answer in the following format: The ’item’ is in ’location’. Do not write anything "
    "else after that.",
)
_QA3 = _TEMPLATE.format(
    instruction="I give you context with the facts about locations and actions of different persons hidden in some "
    "random text and a question. " + _CARRIED,
    examples=_examples(
        "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel journeyed to "
        "the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the apple before the "
        "kitchen?\nAnswer: Before the kitchen the apple was in the bathroom.",
        "John went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra took the "
        "football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the football before the "
        "bedroom?\nAnswer: Before the bedroom the football was in the garden.",
    ),
    post_prompt="Always return your answer in the following format: Before the $location_1$ the $item$ was in the "
    "$location_2$. Do not write anything else after that.",
)
_QA4 = _TEMPLATE.format(
    instruction="I will give you context with the facts about different people, their location and actions, hidden in "
    "some random text and a question. You need to answer the question based only on the information from the facts.",
    examples=_examples(
        "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south of?\n"
        "Answer: bedroom",
        "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?\n"
        "Answer: garden",
    ),
    post_prompt=f"{_ONE_WORD} - location. Do not write anything else after that.",
)
_QA5 = _TEMPLATE.format(
    instruction="I will give you context with the facts about locations and their relations hidden in some random text "
    "and a question. You need to answer the question based only on the information from the facts.",
    examples=_examples(
        "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took the milk "
        "there. Who did Mary give the apple to?\nAnswer: Fred",
        "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill travelled to "
        "the bedroom. Who gave the football?\nAnswer: Jeff",
        "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff went back "
        "to the garden. What did Fred give to Bill?\nAnswer: apple",
    ),
    post_prompt=f"{_ONE_WORD}. Do not write anything else after that. Do not explain your answer.",
)


def tasks() -> dict[str, Task]:
    """With bAbI's and PG-19's files, then without."""
    templates = {"qa1": _QA1, "qa2": _QA2, "qa3": _QA3, "qa4": _QA4, "qa5": _QA5}
    made = [
        Task(
            name=f"babilong_{question}" + ("_offline" if offline else ""),
            family=BabiLong,
            options=MappingProxyType({"stories": question, "offline": offline}),
            template=template,
            answer_prefix="",
            tokens_to_generate=20,
            metric="gift" if question == "qa5" else "place",
        )
        for offline in (False, True)
        for question, template in templates.items()
    ]
    return {task.name: task for task in made}
