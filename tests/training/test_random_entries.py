"""Random entries over a layer, a block or the network: what is drawn, what is saved."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.methods import make_method

K = 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attached(tiny: Path, scope: str, *overrides: str, device: str = "cpu"):
    fields = [f"model={tiny}", "adapter.method=random_entries", f"adapter.k={K}", f"adapter.random_scope={scope}"]
    method = make_method(load_recipe("tiny_arithmetic", [*fields, *overrides]))
    base = AutoModelForCausalLM.from_pretrained(tiny).to(device)
    return method, method.attach(base, "CAUSAL_LM")


def layers_of(model) -> dict:
    return {name: module for name, module in model.named_modules() if hasattr(module, "shira_indices")}


@pytest.mark.parametrize("scope", ["layer", "block", "network"])
def test_as_many_as_k_of_every_neuron_are_drawn_over_the_scope(tiny: Path, scope: str) -> None:
    method, model = attached(tiny, scope)
    layers = layers_of(model)
    assert len(layers) == 2 * len(TARGETS)
    counts: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for name, layer in layers.items():
        rows, columns = layer.shira_indices["default"].long()
        assert rows.min() >= 0 and rows.max() < layer.out_features
        assert columns.min() >= 0 and columns.max() < layer.in_features
        assert len((rows * layer.in_features + columns).unique()) == len(rows) == len(layer.shira_weight["default"])
        group = {"layer": name, "block": name.partition("layers.")[2][0], "network": ""}[scope]
        counts[group] = counts.get(group, 0) + len(rows)
        wanted[group] = wanted.get(group, 0) + K * layer.out_features
        if scope != "layer":
            assert len(rows) != K * layer.out_features  # a draw of this seed, without regard to layers
    assert counts == wanted
    assert method.trainable(model) == sum(wanted.values())


def test_a_seed_draws_the_same_and_layers_draw_their_own(tiny: Path) -> None:
    def drawn(*overrides: str, device: str = "cpu") -> list[torch.Tensor]:
        _, model = attached(tiny, "layer", *overrides, device=device)
        return [layer.shira_indices["default"] for layer in layers_of(model).values()]

    first, again, planned, other = drawn(), drawn(), drawn(device="meta"), drawn("train.seed=5")
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, planned))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[len(TARGETS)])  # q_proj of two layers


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_peft_loads_what_is_saved(tiny: Path, tmp_path: Path, scope: str) -> None:
    method, model = attached(tiny, scope)
    torch.manual_seed(0)
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.shira_weight["default"])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        method.save(model, tmp_path)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path))
        assert torch.equal(loaded(ids).logits, expected)
        assert loaded.merge_and_unload()(ids).logits.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    changes = list(method.changes(tmp_path, {}))
    assert sum(change.entries for change in changes) == method.trainable(model)  # without what fills layers up
    squares = sum(float(layer.shira_weight["default"].detach().square().sum()) for layer in layers_of(model).values())
    assert sum(change.squared for change in changes) == pytest.approx(squares)


def test_more_than_there_are_or_none_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.k = 1000: .* entries, but a layer has 4096; use a smaller k"):
        attached(tiny, "layer", "adapter.k=1000")
    with pytest.raises(UserError, match=r"adapter\.k = 40: filled up to SHiRA's r = .* use a smaller k"):
        attached(tiny, "network", "adapter.k=40")


def test_the_scope_is_of_this_method(tiny: Path) -> None:
    """With neuroada's selection = random it would be left unread."""
    fields = [f"model={tiny}", "adapter.selection=random", "adapter.random_scope=layer"]
    with pytest.raises(UserError, match=r"adapter.random_scope = layer: is of random_entries, not of neuroada; leave"):
        make_method(load_recipe("tiny_arithmetic", fields)).check("single")
