"""Requests and tasks for lm-evaluation-harness, about documents with needles."""

import json
import random

from nemo_star.evaluation.needles import make_document, question

TASKS = {
    "needle": """
task: needle
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list: [{{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
""",
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
}
"""Name -> YAML, less the file of its documents."""


def rows(name, sentences, count=6):
    """Documents, each with a question whose answer the demo model finds, and wrong answers."""
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        document = make_document(rng, filler_sentences=sentences, needles=2)
        key, value = next(iter(document.needles.items()))
        choices = [value, *(str(rng.randrange(10**6, 10**7)) for _ in range(3))]
        rng.shuffle(choices)
        prompt = f"{document.text}\n\n{question(key)}"
        yield {"prompt": prompt, "answer": value, "choices": choices, "label": choices.index(value)}


def write_tasks(folder):
    """A folder for include_path."""
    for name, sentences in (("needle", 40), ("choice", 4)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(name, sentences)))
        (folder / f"{name}.yaml").write_text(TASKS[name].format(file=file))
    return folder


def asked():
    """Method of the harness's `LM` -> arguments of requests, odd ones among them."""
    documents = list(rows("asked", 5, 3))
    scored = [(row["prompt"], f" {choice}") for row in documents for choice in (*row["choices"][:2], row["answer"])]
    scored += [(row["prompt"] + " \n ", row["answer"]) for row in documents[:1]]  # the blanks move to the continuation
    scored += [
        ("", "The captain found a letter."),
        ("One line", " and on"),
        ("a\nb", "c"),
        ("a\n", "c"),
        ("\n\nx", " y"),
    ]
    until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    answered = [(row["prompt"], until) for row in documents]
    answered += [("One line", {"until": ["x", ""], "max_gen_toks": 9}), ("a\nb", {"until": [], "max_new_tokens": 5})]
    return {
        "loglikelihood": scored,
        "loglikelihood_rolling": [(row["prompt"],) for row in documents] + [("short",), ("",)],
        "generate_until": answered,
    }


def ask(lm, requests):
    """Method -> what an `LM` makes of `asked()`."""
    from lm_eval.api.instance import Instance

    return {
        method: getattr(lm, method)([Instance(method, {}, arguments, 0) for arguments in given], disable_tqdm=True)
        for method, given in requests.items()
    }


def same(found, expected, tolerance=5e-4):
    """Whether two results of `ask` agree: log-probabilities within the tolerance, all else exactly."""
    pairs = zip(found["loglikelihood"], expected["loglikelihood"], strict=True)
    near = all(abs(one[0] - other[0]) < tolerance and one[1] == other[1] for one, other in pairs)
    rolled = zip(found["loglikelihood_rolling"], expected["loglikelihood_rolling"], strict=True)
    near = near and all(abs(one - other) < tolerance for one, other in rolled)
    return near and found["generate_until"] == expected["generate_until"]
