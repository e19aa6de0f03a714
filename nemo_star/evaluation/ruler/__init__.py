"""RULER (arXiv 2404.06654): its 13 tasks.

Prompts are equal to those of the official scripts (github.com/NVIDIA/RULER, commit c3f5e3b) with their template `base`,
for the same seed, tokenizer and wonderwords release; each family's file names what can differ. They have no chat
template: where the scripts are given one, its tokens count, too, and it is around cwe's example as well.
"""

from nemo_star.evaluation.ruler.catalog import tasks

__all__ = ["tasks"]
