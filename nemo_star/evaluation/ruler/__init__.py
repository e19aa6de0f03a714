"""RULER (arXiv 2404.06654): its 13 tasks.

Prompts are equal to those of the official scripts (github.com/NVIDIA/RULER, commit c3f5e3b) with their template `base`,
for the same seed, tokenizer and wonderwords release; each family's file names what can differ. A chat template stands
around them later (`evaluation/chat.py`); its tokens are left free, as by the scripts' `--model_template_token`. Where
the scripts write the template into the prompts themselves (`--model_template_type`), it is around cwe's example, too.
"""

from nemo_star.evaluation.ruler.catalog import tasks

__all__ = ["tasks"]
