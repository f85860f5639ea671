"""Ranks without the wait: a process that imports the libraries once, and forks the ranks of every case from itself.

One JSON line on standard input is a case, {"script", "arguments", "ranks", "environment", "out", "err"}; one on
standard output answers it with the ranks' exit statuses. A rank is what torchrun would start: a process of its own with
the launcher's variables, in which `script` is the main module. When one fails, the others are ended.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

# Imported once for all ranks. What a case needs beside them, it imports itself.
import accelerate
import datasets
import deepspeed
import peft
import torch
import transformers
from torch.distributed import TCPStore

import neuroada.training.trainer

PRELOADED = (accelerate, datasets, deepspeed, peft, torch, transformers, neuroada.training.trainer)
GRACE = 10.0  # seconds from the first failed rank until the others are ended


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints here is no answer
    gc.freeze()  # a rank's collections need not walk the libraries' million objects
    for line in sys.stdin:
        answers.write(json.dumps(serve(json.loads(line))) + "\n")
        answers.flush()


def serve(case: dict) -> list[int]:
    """Fork the ranks of a case; their exit statuses."""
    # The ranks' store lives here, as it does in torchrun's agent: no port has to be guessed.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    started = [start(case, rank, store.port) for rank in range(case["ranks"])]
    running, statuses, failed_at = dict.fromkeys(started), {}, None
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(statuses.values()):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in started]


def start(case: dict, rank: int, port: int) -> int:
    """-> the pid of a new rank."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        size = str(case["ranks"])
        launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                    "GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "tests"}  # fmt: skip
        os.environ.clear()
        os.environ.update(case["environment"] | launcher)
        for number, path in ((1, case["out"]), (2, case["err"])):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, number)
            os.close(file)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = [case["script"], *case["arguments"]]
        sys.path.insert(0, str(Path(case["script"]).parent))
        runpy.run_path(case["script"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # at Python's own exit gloo's threads abort now and then


if __name__ == "__main__":
    main()
