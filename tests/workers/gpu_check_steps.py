"""Worker of test_gpu_check.py: made-up steps in a process that can be killed.

Arguments: the folder, and JSON of [[name, code for python -c, limit in seconds], ...].
"""

import json
import signal
import sys

from made_up_steps import carry_out_these

from nemo_star.runtime.launch import run_as_tool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has begun the tests in background
    run_as_tool(lambda: carry_out_these(sys.argv[1], json.loads(sys.argv[2])))
