import subprocess
import sys
import time

from neuroada.engines.watchdog import EXIT_STATUS, Watchdog

HANGING = """
import time
from neuroada.engines.watchdog import Watchdog
watchdog = Watchdog(minutes=0.5 / 60, rank=3)
watchdog.watch("step 16")
watchdog.watch("step 17")

def all_reduce():
    time.sleep(60)

all_reduce()
"""


def test_a_hang_ends_with_the_rank_the_step_and_the_stack() -> None:
    started = time.monotonic()
    environment = {"SLURMD_NODENAME": "n7"}
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, env=environment)
    assert done.returncode == EXIT_STATUS and time.monotonic() - started < 20
    assert "error: node n7, rank 3: step 17 has not ended within train.step_timeout_minutes" in done.stderr
    assert "in all_reduce" in done.stderr


def test_steps_that_end_in_time_and_nothing_watched_are_left_alone() -> None:
    watchdog = Watchdog(minutes=0.5 / 60, rank=0)
    for step in range(4):
        watchdog.watch(f"step {step}")
        time.sleep(0.2)
    watchdog.watch(None)
    time.sleep(0.8)  # this process would be gone
