"""Worker of test_failures.py: rank 1 raises while rank 0 waits for it."""

import os

import torch
import torch.distributed as dist

from nemo_star.runtime.launch import run_as_tool


def main():
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise RuntimeError("no more memory on this rank")
    dist.all_reduce(torch.zeros(1))
    return 0


if __name__ == "__main__":
    run_as_tool(main)
