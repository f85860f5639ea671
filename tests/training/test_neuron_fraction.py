"""A part of the neurons: the same under every engine and world size."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import TinyRuns, assert_same_curve, losses
from safetensors.torch import load_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.methods import make_method

RANKS = [("single", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("zero3", 3), ("fsdp2", 3)]
OUT = (64, 32, 32, 64, 128, 128, 64)  # neurons of the tiny model's seven projections


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name: tensor for name, tensor in found.items() if name.endswith("delta")}


@pytest.mark.parametrize("choice", ["random", "norm"])
def test_every_engine_and_world_size(tiny_runs: TinyRuns, choice: str) -> None:
    fields = ("train.max_steps=3", "adapter.neuron_fraction=0.3", f"adapter.neuron_choice={choice}",
              "optimizer.weight_decay=0.1")  # fmt: skip
    folders = {source: tiny_runs.add(f"{choice}-{source[0]}x{source[1]}", *source, *fields) for source in RANKS}
    tiny_runs.run()
    expected = folders["single", 1]
    trained = 2 * sum(out - int(0.7 * out) for out in OUT)
    for source, folder in folders.items():
        assert_same_curve(losses(folder), losses(expected), name=str(source))
        moved = {name: (delta != 0).any(1) for name, delta in deltas(folder).items()}
        assert sum(int(rows.sum()) for rows in moved.values()) == trained
        assert all((delta != 0).any(1).equal(moved[name]) for name, delta in deltas(expected).items()), source
        assert json.loads((folder / "run.json").read_text())["trainable"] == 4 * trained


def test_other_methods_refuse_it() -> None:
    recipe = load_recipe("tiny_arithmetic", ["adapter.method=masked", "adapter.neuron_fraction=0.5"])
    with pytest.raises(UserError, match="is of neuroada, not of masked"):
        make_method(recipe).check("single")
