"""Run several recipes one after the other in the same ranks: importing torch and DeepSpeed once pays for all of them.

    torchrun --nproc-per-node 3 tests/ranks.py runs.json

runs.json is a list of {"recipe": name, "overrides": [...]}. A run that fails ends the process as launch/train.py would.
"""

import gc
import json
import os
from pathlib import Path

import torch

from neuroada.cli.command import run
from neuroada.config.recipe import load_recipe
from neuroada.training.trainer import train


def main(argv: list[str]) -> None:
    # In this mode torch fills what it allocates with NaN: a value that is read before it is set shows every time.
    torch.use_deterministic_algorithms("NAN_IN_NEW_MEMORY" in os.environ, warn_only=True)
    for wanted in json.loads(Path(argv[0]).read_text()):
        train(load_recipe(wanted["recipe"], wanted["overrides"]))
        gc.collect()


if __name__ == "__main__":
    run(main)
