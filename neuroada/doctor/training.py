"""Short trainings of a random 2-layer Llama by the project's own loop: the same curve wherever it runs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from neuroada.adapter.default_targets import DECODER
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.doctor.check import Check, Found, NotHere, Place, worst
from neuroada.environment import NUMBERS
from neuroada.files import write_json
from neuroada.runs.run_folder import read_metrics
from neuroada.sources.tiny import make_tiny
from neuroada.training.trainer import train

STEPS, BATCH = 6, 8


def recipe_of(place: Place, name: str, dtype: str, engine: dict[str, Any]) -> Path:
    """Write the recipe of the run called `name`, with its model and its data; returns the recipe's file."""
    model, data = place.folder / "tiny", place.folder / "data" / "texts.json"
    if not data.is_file():
        with _quiet():
            make_tiny(model)
        write_json(data, [{"text": f"{row} and {row + 7} is {2 * row + 7}. " * (1 + row % 3)} for row in range(64)])
    recipe = Recipe.model_validate(
        {
            "model": str(model),
            "data": {"datasets": [{"path": str(data)}]},
            "data_dir": str(data.parent),
            # One kernel everywhere: two of them differ in their last bits.
            "adapter": {"k": 4, "target_modules": DECODER, "kernel": "dense"},
            "optimizer": {"lr": 1e-2, "max_grad_norm": 1.0},
            "train": {"max_steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 1, "max_length": 128,
                      "dtype": dtype, "step_timeout_minutes": 5},
            "engine": engine,
            "output_dir": str(place.folder / "runs" / name),
            "provenance": "made for a check",
        }
    )  # fmt: skip
    recipe.save(file := place.folder / f"{name}.yaml")
    return file


def losses(recipe: Path) -> list[float]:
    """Of each step of the run that this recipe made."""
    return [line["loss"] for line in read_metrics(Path(load_recipe(str(recipe)).output_dir) / "metrics.jsonl")]


def trained_here(place: Place, name: str, dtype: str) -> list[float]:
    """The losses of one process, this one, on its device. Computed once for a name."""
    recipe = recipe_of(place, name, dtype, {"name": "single"})
    if not (place.folder / "runs" / name / "adapter").is_dir():
        with _quiet():
            train(load_recipe(str(recipe)))
    return losses(recipe)


@contextmanager
def _quiet() -> Iterator[None]:
    """A run's banner and its bar are none of a table's."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def launched(recipe: Path, ranks: int, **environment: str) -> list[float]:
    """The losses of `ranks` processes that torchrun starts. RuntimeError: what failed, of what they printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in (*NUMBERS, "GROUP_RANK")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               "-m", "neuroada", "train", "--recipe", str(recipe)]  # fmt: skip
    # The watchdog ends ranks that wait for ever; a limit here would leave them behind.
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {what_failed(done.stderr)}")
    return losses(recipe)


def what_failed(printed: str) -> str:
    """The ranks' own errors, or the first exception of one: the launcher's report comes later; else the end."""
    lines = printed.splitlines()
    exceptions = [line for line in lines if re.match(r"(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception)\b", line)]
    return " ".join([line for line in lines if line.startswith("error: ")] or exceptions[:1] or lines[-12:])


class EngineCurve(Check):
    """An engine on as many ranks as there are GPUs, or on two over gloo, against one process."""

    number = f"largest relative difference of the loss over {STEPS} steps, fp32"

    def __init__(self, strategy: str, engine: dict[str, Any], package: str) -> None:
        self.name, self.engine, self.package = f"engine-{strategy}", engine, package
        self.claim = f"{strategy} on the cards here loses the same as one process"

    def run(self, place: Place) -> Found:
        if find_spec(self.package) is None:
            raise NotHere(f"needs {self.package}: pip install {self.package}")
        cards = torch.cuda.device_count() if place.device.type == "cuda" else 2
        ranks = max(ranks for ranks in (1, 2, 4, 8) if ranks <= cards)  # which divide the batch
        backend = "NCCL" if place.device.type == "cuda" else "gloo, on the CPU"
        expected = trained_here(place, "single-fp32", "fp32")
        found = launched(recipe_of(place, self.name, "fp32", self.engine), ranks)
        numbers = {"ranks": float(ranks), "last loss": found[-1], "last loss of one process": expected[-1]}
        return Found(worst(found, expected), 1e-5, f"{ranks} rank(s) over {backend}", numbers)


class Bf16Curve(Check):
    name = "bf16-curve"
    claim = "a training in bf16 loses the same on this device as on its host's CPU"
    number = f"largest relative difference of the loss over {STEPS} steps"

    def run(self, place: Place) -> Found:
        if place.device.type == "cpu":
            raise NotHere("needs a GPU, to compare with the CPU")
        if not torch.cuda.is_bf16_supported():
            raise NotHere(f"{torch.cuda.get_device_name(place.device)} has no bf16")
        found = trained_here(place, "device-bf16", "bf16")
        expected = launched(recipe_of(place, "cpu-bf16", "bf16", {"name": "single"}), 1, CUDA_VISIBLE_DEVICES="")
        return Found(worst(found, expected), 1e-2, numbers={"last loss": found[-1], "last loss, CPU": expected[-1]})
