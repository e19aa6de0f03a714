"""Figures of BENCHMARKS.md on contexts that are asked more than once, on a random Llama of the benchmark's shape.

python tests/workers/measure_contexts.py make DIR        # the checkpoint
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/workers/measure_contexts.py measure DIR
"""

import itertools
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

BLOCK, LONG, SHORT = 2048, 32768, 16384


def make(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_star.checkpoint.convert import import_checkpoint

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=2048, vocab_size=32000, max_position_embeddings=2**20)
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    import_checkpoint(folder / "hf", folder / "converted")


class Clock:
    """An answer that never ends by itself, and when its tokens came."""

    def __init__(self):
        self.times = []

    def choose(self, logits):
        self.times.append(time.perf_counter())
        return int(logits.argmax()), False

    def gaps(self):
        return [after - before for before, after in itertools.pairwise(self.times)]


def second_question(llm):
    """Seconds to the first token of a first question, encoding and all, and of a second one."""
    from nemo_star import SamplingParams

    ids = [(i * i + 7) % 32000 for i in range(LONG)]
    started = time.perf_counter()
    book = llm.encode(ids)
    llm.generate(book, [[5, 6, 7]], SamplingParams(max_tokens=1))
    first = time.perf_counter() - started
    started = time.perf_counter()
    llm.generate(book, [[8, 6, 7]], SamplingParams(max_tokens=1))
    return first, time.perf_counter() - started


def gaps(llm, *, beside):
    """Seconds between the tokens of a live answer, while another context is encoded, or not."""
    from nemo_star.engine.scheduler import ContextWork, Question

    clock = Clock() if llm.is_first_of_replica else None
    other = Clock() if llm.is_first_of_replica else None
    scheduler = llm.scheduler(max_batch_size=4)
    book = llm.encode([(i * i + 3) % 32000 for i in range(SHORT)])
    scheduler.add(Question(book.work(), [5, 6, 7], 40, [clock]))
    scheduler.step()
    if beside:
        work = ContextWork([(i * i + 11) % 32000 for i in range(SHORT)])
        scheduler.add(Question(work, [5, 6, 7], 2, [other]))
    scheduler.run()
    return clock.gaps() if clock else [0.0]


def measure(folder):
    from nemo_star import LLM

    llm = LLM(folder / "converted", attention={"block_size": BLOCK})
    first, second = second_question(llm)
    alone, beside = gaps(llm, beside=False), gaps(llm, beside=True)
    if dist.get_rank() == 0:
        print(
            f"first token on {LONG} tokens: first question {first:.2f} s, second {second:.4f} s: 1/{first / second:.0f}"
        )
        print(f"longest gap between tokens: alone {max(alone):.3f} s, beside a prefill of {SHORT}: {max(beside):.3f} s")


if __name__ == "__main__":
    {"make": make, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
