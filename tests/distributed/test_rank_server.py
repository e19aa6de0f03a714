"""Ranks that are forked: their environment and output, and what happens when one fails or hangs."""

from launch import forked

SCRIPT = """
import os, signal, sys
rank = os.environ["RANK"]
print(rank, os.environ["WORLD_SIZE"], sys.argv[1])
if sys.argv[1] == "fails" and rank == "1":
    raise ValueError("rank 1 fails")
if sys.argv[1] != "ends":
    signal.pause()
"""


def test_what_becomes_of_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = forked(2, script, "ends")
    assert (ended.returncode, sorted(ended.stdout.splitlines())) == (0, ["0 2 ends", "1 2 ends"])
    failed = forked(2, script, "fails")
    assert failed.returncode == 1
    assert "ValueError: rank 1 fails" in failed.stderr
    assert forked(2, script, "hangs", timeout=1).returncode == -9
