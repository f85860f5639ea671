"""Which connections and neurons train, and how the loss is averaged: the same under every engine and world size."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import TinyRuns, assert_same_curve, losses
from safetensors.torch import load_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.methods import make_method

RANKS = [("single", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)]
MORE_RANKS = [("zero3", 3), ("fsdp2", 4)]  # where passes are shared: as many as there are, and one that has none
OUT = (64, 32, 32, 64, 128, 128, 64)  # neurons of the tiny model's seven projections
BY_EXAMPLES = "adapter.calibration_examples=20"  # three passes
CASES = {
    "gradient": ["adapter.selection=gradient", BY_EXAMPLES],
    "wanda": ["adapter.selection=wanda", BY_EXAMPLES],
    "lift": ["adapter.selection=lift", "adapter.lift_rank=8"],
    "random neurons": ["adapter.neuron_fraction=0.3", "optimizer.weight_decay=0.1"],
    "large neurons": ["adapter.neuron_fraction=0.3", "adapter.neuron_choice=norm", "optimizer.weight_decay=0.1"],
    "micro batches": ["train.loss_average=micro_batch", "train.micro_batch_size=4"],
}


@pytest.fixture(scope="module")
def folders(tiny_runs: TinyRuns) -> dict[str, dict[tuple[str, int], Path]]:
    """case -> engine and world size -> the folder of a run of three steps."""
    found = {
        case: {
            source: tiny_runs.add(
                f"ablation-{case.replace(' ', '-')}-{source[0]}x{source[1]}", *source, "train.max_steps=3", *fields
            )
            for source in RANKS + MORE_RANKS * (BY_EXAMPLES in fields)
        }
        for case, fields in CASES.items()
    }
    tiny_runs.run()
    return found


def adapter(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name: tensor for name, tensor in found.items() if name.endswith(kind)}


@pytest.mark.parametrize("case", CASES)
def test_the_same_connections_and_curve(folders: dict, case: str) -> None:
    expected = folders[case]["single", 1]
    for source, folder in folders[case].items():
        assert_same_curve(losses(folder), losses(expected), name=str(source))
        chosen = adapter(folder, "idx")
        assert all(chosen[name].equal(idx) for name, idx in adapter(expected, "idx").items()), source


def test_each_rule_has_its_own_choice(folders: dict) -> None:
    rules = [adapter(folders[case]["single", 1], "idx") for case in ("gradient", "wanda", "lift", "random neurons")]
    for number, one in enumerate(rules):
        for other in rules[:number]:
            assert not any(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("case", ["random neurons", "large neurons"])
def test_frozen_neurons_do_not_move(folders: dict, case: str) -> None:
    trained = 2 * sum(out - int(0.7 * out) for out in OUT)
    expected = adapter(folders[case]["single", 1], "delta")
    for source, folder in folders[case].items():
        moved = {name: (delta != 0).any(1) for name, delta in adapter(folder, "delta").items()}
        assert sum(int(rows.sum()) for rows in moved.values()) == trained, source
        assert all(rows.equal((expected[name] != 0).any(1)) for name, rows in moved.items()), source
        assert json.loads((folder / "run.json").read_text())["trainable"] == 4 * trained


def test_other_methods_refuse_a_fraction() -> None:
    recipe = load_recipe("tiny_arithmetic", ["adapter.method=masked", "adapter.neuron_fraction=0.5"])
    with pytest.raises(UserError, match="is of neuroada, not of masked"):
        make_method(recipe).check("single")


def test_a_micro_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"micro_batch_size = 3: with train\.loss_average = micro_batch it must divide"):
        load_recipe("tiny_arithmetic", ["train.loss_average=micro_batch", "train.micro_batch_size=3"])
