"""How a command ends."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, os
import torch.distributed as dist
from neuroada.cli.command import run
from neuroada.errors import Preempted, UserError

def main(argv):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    atexit.register(os.abort)  # as torch's threads do there, now and then
    print("done")
    if argv[0] == "mistake":
        raise UserError("a mistake")
    if argv[0] == "preempted":
        raise Preempted("stopped at step 3")

run(main)
"""


@pytest.mark.parametrize(("end", "status"), [("well", 0), ("mistake", 2), ("preempted", 75)])
def test_a_rank_leaves_with_its_own_status(end: str, status: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    ended = subprocess.run([sys.executable, "-c", SCRIPT, end], env=environment, capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stdout == "done\n"
    assert ("error: a mistake" in ended.stderr) == (end == "mistake")


def test_a_library_s_hint_is_no_second_line() -> None:
    """bitsandbytes', on CPUs with bf16, when PEFT imports it."""
    script = """
import logging
from neuroada.cli.command import run
from neuroada.errors import UserError

def main(argv):
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load a kernel")
    raise UserError("a mistake")

run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: a mistake\n")
