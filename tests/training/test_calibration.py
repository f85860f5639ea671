"""Connections that training examples choose: any number of them, the same under any engine and world size."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed_runs import TinyRuns
from safetensors.torch import load_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.training.calibration import PASS, ExampleCalibration

RANKS = [("single", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("zero3", 3), ("fsdp2", 3)]


def chosen(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name: tensor for name, tensor in found.items() if name.endswith("idx")}


def test_every_engine_and_world_size_chooses_the_same(tiny_runs: TinyRuns) -> None:
    fields = ("train.max_steps=1", "adapter.selection=gradient", "adapter.calibration_examples=20")  # three passes
    folders = {source: tiny_runs.add(f"chosen-{source[0]}x{source[1]}", *source, *fields) for source in RANKS}
    tiny_runs.run()
    first, *others = (chosen(folder) for folder in folders.values())
    for source, other in zip(RANKS[1:], others, strict=True):
        assert all(other[name].equal(first[name]) for name in first), source


class Thirty:
    """An objective of thirty examples whose loss counts them."""

    def __init__(self) -> None:
        self.data = type("Data", (), {"lengths": np.arange(30)[::-1].copy(), "__len__": lambda self: 30})()
        self.seen: list[np.ndarray] = []

    def batch(self, step: int, size: int) -> np.ndarray:
        return np.arange(size)

    def loss(self, model: object, part: np.ndarray, of: np.ndarray, device: object) -> torch.Tensor:
        self.seen.append(part)
        return torch.tensor(len(part) / len(of), requires_grad=True)


@pytest.mark.parametrize(("wanted", "examples"), [("5", 5), ("8", 8), ("20", 20), ("all", 30)])
def test_every_example_is_in_one_pass(wanted: str, examples: int) -> None:
    recipe = load_recipe("tiny_arithmetic", ["adapter.selection=gradient", f"adapter.calibration_examples={wanted}"])
    objective, engine = Thirty(), SimpleNamespace(device=None, release=lambda: None)
    for backward in ExampleCalibration(recipe, objective).on(engine, None).backwards():
        backward()
    assert all(len(part) <= PASS for part in objective.seen)
    assert sorted(np.concatenate(objective.seen)) == list(range(examples))


def test_more_examples_than_there_are() -> None:
    fields = ["adapter.selection=gradient", "adapter.calibration_examples=31"]
    with pytest.raises(UserError, match="calibration_examples = 31: the training set has 30; use all"):
        ExampleCalibration(load_recipe("tiny_arithmetic", fields), Thirty())
