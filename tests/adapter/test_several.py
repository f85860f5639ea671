"""Several adapters of one base: active together, one for each row, combined, swapped, exported."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import ATTENTION, X, assert_base_is_whole, logits, make_base
from torch import nn
from transformers import LlamaForCausalLM

from neuroada import NeuroAdaConfig, hotswap_adapter
from neuroada.adapter.export import export_shira
from neuroada.errors import UserError
from neuroada.ops import unpack_indices

CONFIGS = {
    "a": {"k": 5, "target_modules": ATTENTION},
    "b": {"k": 3, "target_modules": ["q_proj", "o_proj"]},
    "c": {"k": 4, "target_modules": ["q_proj", "up_proj"], "selection": "random"},
}


@pytest.fixture
def base() -> LlamaForCausalLM:
    return make_base()


def change(model: nn.Module, seed: int = 1, adapter: str = "") -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if f"neuroada_delta.{adapter}" in name:
            param.data.copy_(0.05 * torch.randn(param.shape, generator=generator))
    return model


@pytest.fixture
def several(base) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(**CONFIGS["a"]), adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, NeuroAdaConfig(**CONFIGS[name]))
    return change(model).eval()


def dense(base: LlamaForCausalLM, model: PeftModel, weights: dict[str, float]) -> LlamaForCausalLM:
    """The base with the adapters' weighted changes added densely."""
    other = copy.deepcopy(base)
    for adapter, weight in weights.items():
        for layer in model.base_model.adapted_layers(adapter):
            change = weight * layer.get_delta_weight(adapter)
            other.get_submodule(layer.name).weight.data += change
    return other


def test_active_together_their_changes_add_up(base, several) -> None:
    """Also where they share connections, as a and b do, unmerged and merged, and for each one's gradient."""
    several.base_model.set_adapter(["a", "b", "c"])
    expected = dense(base, several, {"a": 1, "b": 1, "c": 1})
    torch.testing.assert_close(logits(several), logits(expected), rtol=1e-5, atol=1e-5)
    few = X[:1, :3]
    torch.testing.assert_close(logits(several, few), logits(expected, few), rtol=1e-5, atol=1e-5)
    several(input_ids=X, labels=X).loss.backward()
    expected.requires_grad_(True)(input_ids=X, labels=X).loss.backward()
    for adapter in CONFIGS:
        for layer in several.base_model.adapted_layers(adapter):
            wanted = expected.get_submodule(layer.name).weight.grad
            wanted = wanted.gather(1, unpack_indices(layer.neuroada_idx[adapter]))
            torch.testing.assert_close(layer.neuroada_delta[adapter].grad, wanted, rtol=1e-4, atol=1e-6)
    before = logits(several)
    several.merge_adapter(["a"])
    several.merge_adapter(["b", "c"])
    assert logits(several).equal(before)
    several.unmerge_adapter()
    assert logits(several).equal(before)
    assert_base_is_whole(several.unload(), base)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("length", [1, 16])
def test_each_row_its_adapter(base, several, gradients: bool, length: int) -> None:
    names = ["a", "__base__", "c", "b", "a", "__base__", "c"]
    ids = torch.randint(0, 128, (7, length), generator=torch.Generator().manual_seed(2))
    with torch.set_grad_enabled(gradients):
        mixed = several(input_ids=ids, adapter_names=names).logits.detach()
    for row, name in enumerate(names):
        alone = base if name == "__base__" else several
        if name != "__base__":
            several.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(alone, ids[row : row + 1])[0], rtol=1e-5, atol=1e-5)


def test_each_row_its_adapter_when_generating(several) -> None:
    names = ["a", "__base__", "b"]
    ids = torch.randint(0, 128, (3, 4), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        mixed = several.generate(input_ids=ids, adapter_names=names, num_beams=beams, **options)
        for row, name in enumerate(names):
            if name == "__base__":
                with several.disable_adapter():
                    alone = several.generate(input_ids=ids[row : row + 1], num_beams=beams, **options)
            else:
                several.set_adapter(name)
                alone = several.generate(input_ids=ids[row : row + 1], num_beams=beams, **options)
            assert mixed[row, : alone.shape[1]].equal(alone[0]), (beams, name)


def test_wrong_names_for_rows_are_told(several) -> None:
    with pytest.raises(UserError, match="adapter_names: d not among the model's"):
        several(input_ids=X, adapter_names=["a", "d"])
    with pytest.raises(ValueError, match="3 names for a batch of 2 rows"):
        several(input_ids=X, adapter_names=["a", "b", "a"])


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_a_weighted_combination_is_exact(base, several, tmp_path: Path, combination: str) -> None:
    weights = {"a": 0.5, "b": -2.0, "c": 1.5}
    several.add_weighted_adapter([*weights], [*weights.values()], "all", combination_type=combination)
    several.set_adapter("all")
    expected = dense(base, several, weights)
    torch.testing.assert_close(logits(several), logits(expected), rtol=1e-5, atol=1e-5)
    several.save_pretrained(tmp_path, selected_adapters=["all"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "all")
    assert logits(loaded).equal(logits(several))


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_pruned_combinations(several, combination: str) -> None:
    several.add_weighted_adapter(["a", "b"], [1.0, 1.0], "all", combination_type=combination, density=1.0)
    for layer in several.base_model.adapted_layers("all"):
        parts = [layer.get_delta_weight(name) for name in ("a", "b") if name in layer.neuroada_idx]
        total = torch.stack(parts).sum(0)
        if combination.endswith("ties"):  # the mean of what agrees with the majority's sign
            agreeing = torch.stack([part * (part.sign() == total.sign()) for part in parts])
            total = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
        torch.testing.assert_close(layer.get_delta_weight("all"), total)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapters": ["a", "x"]}, "adapters: 'x' is not one"),
        ({"weights": [1.0]}, "weights: 1 for 2 adapters"),
        ({"adapter_name": "c"}, "adapter_name: 'c' is taken"),
        ({"combination_type": "svd"}, "combination_type = 'svd': must be one of"),
        ({"combination_type": "ties"}, "density = None"),
    ],
)
def test_wrong_combinations_are_told(several, change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        several.add_weighted_adapter(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "n", **change})
    assert sorted(several.peft_config) == ["a", "b", "c"]


def test_hotswap(base, tmp_path: Path) -> None:
    models = [change(get_peft_model(copy.deepcopy(base), NeuroAdaConfig(**CONFIGS["a"])), seed) for seed in (1, 2)]
    second = logits(models[1].eval())
    models[1].save_pretrained(tmp_path / "second")
    model = models[0].eval()
    first = logits(model)
    hotswap_adapter(model, str(tmp_path / "second"), "default")
    assert logits(model).equal(second) and not second.equal(first)
    other = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(**{**CONFIGS["a"], "k": 4}))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="are 4 of a neuron"):
        hotswap_adapter(model, str(tmp_path / "other"), "default")
    assert logits(model).equal(second)


def test_exported_as_shira_peft_needs_nothing_of_ours(base, several, tmp_path: Path) -> None:
    several.set_adapter("a")
    several.save_pretrained(tmp_path, selected_adapters=["a"])
    sizes = {name: module.in_features for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    export_shira(tmp_path / "a", tmp_path / "shira", sizes)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "shira")
    assert type(loaded.base_model).__name__ == "ShiraModel"
    torch.testing.assert_close(logits(loaded.eval()), logits(several), rtol=1e-5, atol=1e-5)


def test_k_pattern_and_layers(base) -> None:
    config = NeuroAdaConfig(
        k=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], k_pattern={"up_proj": 2}
    )
    model = get_peft_model(copy.deepcopy(base), config)
    sizes = {
        layer.name: layer.neuroada_delta["default"].shape[1] for layer in model.base_model.adapted_layers("default")
    }
    assert sizes == {"model.layers.1.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 2}


@pytest.mark.parametrize(
    ("targets", "found"), [("all-linear", 14), (r".*layers\.0.*\.(q|v)_proj", 2), ("q_proj", 0), ({"q_proj"}, 2)]
)
def test_targets(targets, found: int) -> None:
    model = make_base(tie_word_embeddings=True)
    if not found:  # a string is an expression for the whole name
        with pytest.raises(UserError, match="matches no module"):
            get_peft_model(model, NeuroAdaConfig(k=2, target_modules=targets))
        return
    tuned = get_peft_model(model, NeuroAdaConfig(k=2, target_modules=targets))
    assert len(tuned.base_model.adapted_layers("default")) == found


def test_a_tied_head_alone_is_adapted() -> None:
    base = make_base(tie_word_embeddings=True)
    model = change(get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=2, target_modules=["lm_head"]))).eval()
    before = logits(model)
    assert not before.equal(logits(base))
    model.merge_adapter()
    assert logits(model).equal(before)
    assert model.get_input_embeddings().weight.equal(base.get_input_embeddings().weight)
    model.unmerge_adapter()
    assert model.get_output_embeddings().base_layer.weight is model.get_input_embeddings().weight


def test_the_caller_s_configuration_stays_as_it_was(base, tmp_path: Path) -> None:
    config = NeuroAdaConfig(**CONFIGS["a"])
    model = change(get_peft_model(copy.deepcopy(base), config))
    model.save_pretrained(tmp_path)
    assert config.base_fingerprint is None and config.to_dict()["base_fingerprint"] is None
    other = make_base(hidden_size=32)
    get_peft_model(other, config)(input_ids=X)


def test_a_refused_adapter_leaves_nothing(base, several, tmp_path: Path) -> None:
    several.save_pretrained(tmp_path, selected_adapters=["a"])
    other = copy.deepcopy(base)
    other.model.layers[1].self_attn.v_proj.weight.data += 0.5
    with pytest.raises(UserError, match="trained on other base weights"):
        PeftModel.from_pretrained(other, tmp_path / "a")
    assert not any("neuroada" in name for name, _ in other.named_parameters())
    model = get_peft_model(other, NeuroAdaConfig(**CONFIGS["b"]), adapter_name="b")
    with pytest.raises(UserError, match="trained on other base weights"):
        model.load_adapter(tmp_path / "a", adapter_name="a")
    assert [*model.peft_config] == ["b"] and not model.base_model.adapted_layers("a")
    with pytest.raises(UserError, match="k = 70"):
        model.add_adapter("x", NeuroAdaConfig(k=70, target_modules=["q_proj"]))
    assert [*model.peft_config] == ["b"] and not model.base_model.adapted_layers("x")
    model(input_ids=X)


def test_half_deepcopy_and_token_indices(base) -> None:
    config = NeuroAdaConfig(k=3, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model = change(get_peft_model(copy.deepcopy(base), config)).eval()
    twin = copy.deepcopy(model)
    assert logits(twin).equal(logits(model))
    change(twin, 5)
    assert not logits(twin).equal(logits(model))
    torch.testing.assert_close(logits(twin.half()).float(), logits(twin.float()), rtol=1e-2, atol=1e-2)


def test_a_hundred_adapters_in_memory(base, monkeypatch) -> None:
    """Six bytes a connection each beside one base, switched without a file, a copy or a write to a weight."""
    config = NeuroAdaConfig(k=4, target_modules=ATTENTION, selection="random")
    before = sum(param.nbytes for param in base.parameters())
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config, adapter_name="0").eval()
    for number in range(1, 100):
        model.add_adapter(str(number), config)
    change(model)
    weights = [layer.base.stored for layer in model.base_model.adapted_layers("0")]
    neurons = sum(len(weight) for weight in weights)
    assert sum(param.nbytes for param in model.parameters()) == before + 100 * 6 * 4 * neurons
    assert not list(model.buffers()) or sum(buffer.nbytes for buffer in model.buffers()) < 1000
    places = [(weight.data_ptr(), weight._version) for weight in weights]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    with monkeypatch.context() as patch:
        for name in ("builtins.open", "safetensors.safe_open", "safetensors.torch.load_file"):
            patch.setattr(name, refuse)
        found = {}
        for number in (0, 57, 99, 57):
            model.set_adapter(str(number))
            found[number] = logits(model)
    assert [(weight.data_ptr(), weight._version) for weight in weights] == places
    for number, value in found.items():
        torch.testing.assert_close(value, logits(dense(untouched, model, {str(number): 1})), rtol=1e-5, atol=1e-5)
    assert not found[0].equal(found[57])
