"""Worker of test_failures.py: rank 1 never comes to the collective that rank 0 waits in."""

import threading

import torch
import torch.distributed as dist

from nemo_star.parallel.groups import initialize
from nemo_star.runtime.launch import run_as_tool
from nemo_star.runtime.watchdog import watchdog_of_this_job


def main():
    with watchdog_of_this_job(timeout_minutes=0.02) as watchdog:
        initialize()
        if dist.get_rank() == 1:
            watchdog.step("layer 1 of its stage")
            threading.Event().wait()
        dist.all_reduce(torch.zeros(1))
    return 0


if __name__ == "__main__":
    run_as_tool(main)
