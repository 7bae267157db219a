"""The watchdog ends a process that stops beating, with its stacks, and leaves one that beats or has left the block."""

import subprocess
import sys

from runs import REPOSITORY

SCRIPT = """
import time
from sr_dpo_jax.durable.watchdog import Watchdog

def a_step_that_hangs():
    time.sleep(20)

with Watchdog(1) as watchdog:
    for _ in range({beats}):
        time.sleep(0.3)
        watchdog.beat("any", "arguments")
    {last}
time.sleep(1.5)
print("the end")
"""


def run(**parts):
    script = SCRIPT.format(**parts)
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=15)


def test_a_step_that_hangs_ends_the_process_with_its_stacks():
    ended = run(beats=0, last="a_step_that_hangs()")
    assert ended.returncode == 1 and "the end" not in ended.stdout
    assert "Timeout" in ended.stderr and "a_step_that_hangs" in ended.stderr


def test_beats_start_the_time_again_and_the_end_of_the_block_stops_it():
    ended = run(beats=4, last="pass")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "the end\n", "")
