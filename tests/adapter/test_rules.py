"""selection = lift and wanda, against their definitions."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import ATTENTION, layer_indices, make_base
from torch import nn

from neuroada import NeuroAdaConfig, select_by_activations
from neuroada.adapter.selection_file import load_selection
from neuroada.errors import UserError
from neuroada.offline.select import select
from neuroada.ops import unpack_indices

TARGETS = [*ATTENTION, "up_proj", "down_proj"]  # square, tall, wide
IDS = torch.randint(0, 128, (6, 16), generator=torch.Generator().manual_seed(5))


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def lifted(base: nn.Module, rank: int = 6) -> dict[str, torch.Tensor]:
    config = NeuroAdaConfig(k=4, selection="lift", lift_rank=rank, target_modules=TARGETS)
    tuned = get_peft_model(copy.deepcopy(base), config)
    return {layer.name: layer_indices(layer) for layer in tuned.base_model.adapted_layers("default")}


def test_lift_is_the_largest_after_rank_reduction() -> None:
    base = make_base()
    for name, idx in lifted(base).items():
        weight = base.get_submodule(name).weight.detach().double()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        reduced = (u[:, :6] * s[:6]) @ v[:6]
        assert idx.equal(largest(reduced.abs(), 4)), name
        assert not idx.equal(largest(weight.abs(), 4))


def test_lift_on_files(tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path / "model")
    select(tmp_path / "model", 4, tmp_path / "lift", selection="lift", lift_rank=6, target_modules=TARGETS)
    found, expected = load_selection(tmp_path / "lift"), lifted(base)
    assert found.keys() == expected.keys()
    assert all(unpack_indices(found[name]).equal(expected[name]) for name in found)
    with pytest.raises(UserError, match=r"--lift-rank 64: .* has rank 64 at most"):
        select(tmp_path / "model", 4, tmp_path / "x", selection="lift", lift_rank=64, target_modules=TARGETS)


def test_a_rank_that_reduces_nothing() -> None:
    with pytest.raises(UserError, match=r"lift_rank = 64: .* has rank 64 at most"):
        lifted(make_base(), 64)


def by_activations(batches: list[dict[str, torch.Tensor]], task_type: str | None = None) -> dict[str, torch.Tensor]:
    config = NeuroAdaConfig(k=4, selection="wanda", target_modules=TARGETS, task_type=task_type)
    tuned = get_peft_model(make_base(), config)
    with pytest.raises(UserError, match="select_by_activations"):
        tuned(**batches[0])
    select_by_activations(tuned.base_model, "default", [partial(tuned, **batch) for batch in batches])
    tuned(**batches[0])
    return {layer.name: layer_indices(layer) for layer in tuned.base_model.adapted_layers("default")}


def test_wanda_is_weight_times_input_norm() -> None:
    base = make_base()
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple) -> None:
        seen[name] = args[0].detach().flatten(0, -2)

    found = by_activations([{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}])
    for name in found:
        base.get_submodule(name).register_forward_pre_hook(partial(note, name))
    base(input_ids=IDS)
    for name, idx in found.items():
        assert idx.equal(largest(base.get_submodule(name).weight.detach().abs() * seen[name].norm(dim=0), 4)), name


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_wanda_leaves_padding_out(task_type: str | None) -> None:
    lengths = torch.tensor([16, 9, 4, 12, 7, 16])
    mask = (torch.arange(16) < lengths[:, None]).long()
    alone = [{"input_ids": row[None, :length]} for row, length in zip(IDS, lengths.tolist(), strict=True)]
    padded = by_activations([{"input_ids": IDS, "attention_mask": mask}], task_type)
    expected = by_activations(alone, task_type)
    assert all(padded[name].equal(expected[name]) for name in padded)
