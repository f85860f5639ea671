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
from neuroada.training.trainer import Trainer


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


def test_the_time_left_is_told_from_tokens_and_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty passes of a second, the long ones first: told after three seconds, and again after twelve."""
    trainer = Trainer.__new__(Trainer)
    trainer.watchdog, trainer.engine = SimpleNamespace(watch=lambda what: None), SimpleNamespace(rank=0, world_size=1)
    trainer.stop = SimpleNamespace(agreed=lambda engine: False)
    for number in range(20):
        monkeypatch.setattr("neuroada.training.trainer.time.perf_counter", lambda now=number: 100.0 + now)
        trainer._before_selection_pass(number, 20, number / 15 if number < 12 else 0.8 + (number - 12) / 40)
    told = [line for line in capsys.readouterr().out.splitlines() if "passes of the selection left" in line]
    assert [line.split()[2] for line in told] == ["0:00:12", "0:00:03"]
