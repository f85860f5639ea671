"""Run several recipes one after the other in the same ranks: importing torch and DeepSpeed once pays for all of them.

    torchrun --nproc-per-node 3 tests/ranks.py runs.json

runs.json is a list of {"recipe": name, "overrides": [...]}. A run that fails ends the process as launch/train.py would.
"""

import gc
import json
from pathlib import Path

from neuroada.cli.command import run
from neuroada.config.recipe import load_recipe
from neuroada.training.trainer import train


def main(argv: list[str]) -> None:
    for wanted in json.loads(Path(argv[0]).read_text()):
        train(load_recipe(wanted["recipe"], wanted["overrides"]))
        gc.collect()


if __name__ == "__main__":
    run(main)
