"""neuron_fraction: a part of the neurons trains, the others stay as they are to the bit."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import ATTENTION, X, logits, make_base, weights

from neuroada import NeuroAdaConfig
from neuroada.adapter.neurons import frozen_count
from neuroada.errors import UserError

DECAY = 0.1


def attached(choice: str = "random", fraction: float = 0.3, **fields) -> PeftModel:
    config = NeuroAdaConfig(
        k=5, target_modules=ATTENTION, neuron_fraction=fraction, neuron_choice=choice, seed=3, **fields
    )
    return get_peft_model(make_base(), config)


def train(model: PeftModel, steps: int = 3) -> torch.optim.AdamW:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=DECAY)
    for _ in range(steps):
        model(input_ids=X, labels=X).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def layers(model: PeftModel) -> list:
    return model.base_model.adapted_layers("default")


@pytest.mark.parametrize("choice", ["random", "norm"])
def test_frozen_neurons_stay_as_they_are(choice: str, tmp_path: Path) -> None:
    base, tuned = make_base(), attached(choice)
    optimizer = train(tuned)
    for layer in layers(tuned):
        frozen, delta = layer.frozen["default"], layer.neuroada_delta["default"]
        assert int(frozen.sum()) == frozen_count(64, 0.3) == 44
        assert not delta[frozen].any() and not delta[frozen].signbit().any()
        assert (delta[~frozen] != 0).any(1).all()
        assert not any(optimizer.state[delta][key][frozen].any() for key in ("exp_avg", "exp_avg_sq"))
    tuned.save_pretrained(tmp_path)
    merged = weights(copy.deepcopy(tuned).merge_and_unload())
    for layer in layers(tuned):
        before, after = base.get_submodule(layer.name).weight, merged[f"{layer.name}.weight"]
        assert (before != after).any(1).equal(~layer.frozen["default"])

    again = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    assert logits(again).equal(logits(tuned))
    assert again.peft_config["default"].neuron_choice == choice
    train(again)
    for mine, theirs in zip(layers(again), layers(tuned), strict=True):
        assert mine.frozen["default"].equal(theirs.frozen["default"])
        assert not mine.neuroada_delta["default"][mine.frozen["default"]].any()


def test_the_others_train_as_without_the_field() -> None:
    """A first step's gradient: that of the whole adapter, without the frozen rows."""
    part, whole = attached(), attached(fraction=1.0)
    for model in (part, whole):
        model(input_ids=X, labels=X).loss.backward()
    for mine, theirs in zip(layers(part), layers(whole), strict=True):
        frozen = mine.frozen["default"]
        expected = theirs.neuroada_delta["default"].grad.masked_fill(frozen[:, None], 0.0)
        assert mine.neuroada_delta["default"].grad.equal(expected)
        assert not theirs.frozen


def test_which_neurons() -> None:
    by_norm = attached("norm")
    for layer in layers(by_norm):
        norms = layer.base_layer.weight.double().norm(dim=1)
        assert norms[~layer.frozen["default"]].min() >= norms[layer.frozen["default"]].max()
    first, *others = (layer.frozen["default"] for layer in layers(attached()))
    assert not any(first.equal(other) for other in others)  # each layer its own
    assert all(
        mine.frozen["default"].equal(theirs.frozen["default"])
        for mine, theirs in zip(layers(attached()), layers(attached()), strict=True)
    )
    inside = get_peft_model(
        make_base().model, NeuroAdaConfig(k=5, target_modules=ATTENTION, neuron_fraction=0.3, seed=3)
    )
    assert layers(inside)[0].frozen["default"].equal(first)  # whatever the model is wrapped in


def test_two_adapters_side_by_side() -> None:
    model = attached()
    model.add_adapter("second", NeuroAdaConfig(k=2, target_modules=ATTENTION, neuron_fraction=0.5, seed=9))
    model.base_model.set_adapter(["default", "second"])
    model(input_ids=X, labels=X).loss.backward()
    for layer in layers(model):
        for name in ("default", "second"):
            assert (layer.neuroada_delta[name].grad == 0).all(1).equal(layer.frozen[name])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"neuron_fraction": 0.0}, "must be a number above 0"),
        ({"neuron_fraction": 1.5}, r"neuron_fraction = 1\.5"),
        ({"neuron_choice": "biggest"}, "neuron_choice = 'biggest'"),
        ({"neuron_fraction": 0.5, "init_weights": False}, "leave init_weights = False out"),
    ],
)
def test_errors(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        NeuroAdaConfig(target_modules=ATTENTION, **fields)
