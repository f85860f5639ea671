"""selection = gradient over several batches."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import ATTENTION, layer_indices, make_base
from torch import nn

from neuroada import NeuroAdaConfig, select_by_gradient
from neuroada.errors import UserError

IDS = torch.randint(0, 128, (20, 16), generator=torch.Generator().manual_seed(5))


def backward(model: nn.Module, ids: torch.Tensor) -> None:
    """Of the batch's part of the mean loss of all of IDS."""
    (model(input_ids=ids, labels=ids).loss * len(ids) / len(IDS)).backward()


def by_gradient(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tuned: PeftModel = get_peft_model(
        copy.deepcopy(make_base()), NeuroAdaConfig(k=4, selection="gradient", target_modules=ATTENTION)
    )
    select_by_gradient(tuned.base_model, "default", [partial(backward, tuned, batch) for batch in batches])
    assert all(param.grad is None for param in tuned.parameters())
    return {layer.name: layer_indices(layer) for layer in tuned.base_model.adapted_layers("default")}


def test_batches_add_up_to_one() -> None:
    one, several = by_gradient([IDS]), by_gradient(list(IDS.split(8)))
    assert all(one[name].equal(several[name]) for name in one)
    first = by_gradient([IDS[:8]])
    assert not any(one[name].equal(first[name]) for name in one)


def test_the_sum_is_of_the_whole_gradient() -> None:
    base = make_base()
    base(input_ids=IDS, labels=IDS).loss.backward()
    for name, idx in by_gradient(list(IDS.split(3))).items():
        dense = base.get_submodule(name).weight.grad.abs()
        best = dense.topk(4, dim=1).values.sum(1)
        assert dense.gather(1, idx).sum(1).numpy() == pytest.approx(best.numpy(), rel=1e-4)


def test_a_layer_that_runs_twice() -> None:
    base = make_base()
    base.model.layers[1].self_attn = base.model.layers[0].self_attn
    config = NeuroAdaConfig(k=4, selection="gradient", target_modules=["layers.0.self_attn.q_proj"])
    tuned = get_peft_model(base, config)
    with pytest.raises(UserError, match="runs more than once in a pass"):
        select_by_gradient(tuned.base_model, "default", lambda: tuned(input_ids=IDS, labels=IDS).loss.backward())
