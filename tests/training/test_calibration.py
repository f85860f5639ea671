"""The training examples that connections are chosen by: any number of them, in passes of a few."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuroada.adapter.selection import Selection
from neuroada.config.fields import Adapter
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.training.calibration import PASS, ExampleCalibration


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
    told: list[tuple[int, int, float]] = []
    for backward in ExampleCalibration(recipe, objective).on(engine, None, lambda *at: told.append(at)).backwards():
        backward()
    passes, lengths = len(objective.seen), [int(objective.data.lengths[part].sum()) for part in objective.seen]
    done = [sum(lengths[:number]) / sum(lengths) for number in range(passes)]
    assert told == [(number, passes, pytest.approx(done[number])) for number in range(passes)]
    longest = [int(objective.data.lengths[part].max()) for part in objective.seen]
    assert longest == sorted(longest, reverse=True)
    assert all(len(part) <= PASS for part in objective.seen)
    assert sorted(np.concatenate(objective.seen)) == list(range(examples))


def test_the_recipe_knows_every_rule() -> None:
    assert Adapter.model_fields["selection"].annotation == Selection


def test_more_examples_than_there_are() -> None:
    fields = ["adapter.selection=gradient", "adapter.calibration_examples=31"]
    with pytest.raises(UserError, match="calibration_examples = 31: the training set has 30; use all"):
        ExampleCalibration(load_recipe("tiny_arithmetic", fields), Thirty())
