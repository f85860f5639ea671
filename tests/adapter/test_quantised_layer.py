"""NeuroAda over a quantised base: the numbers of the dense model of the dequantised weights, and an untouched base."""

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import X, logits, make_base, train_a_little
from torch import nn
from transformers import LlamaForCausalLM

from neuroada import NeuroAdaConfig
from neuroada.adapter import NeuroAdaLinear
from neuroada.errors import UserError
from neuroada.ops import unpack_indices
from neuroada.ops.selection import select_top_k
from neuroada.quantised import FORMATS, Quantisation, QuantisedLinear, dequantise, quantise

SIZES = {"intermediate_size": 128}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def quantised_base(name: str, exact: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return quantise(make_base(**SIZES).to(dtype), Quantisation(name, exact))


def tune(model: nn.Module, k: int = 3) -> PeftModel:
    return get_peft_model(model, NeuroAdaConfig(k=k, target_modules=TARGETS))


def layers(model: nn.Module) -> list[NeuroAdaLinear]:
    return [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]


def packed(model: nn.Module) -> list[torch.Tensor]:
    return [module.packed.detach().clone() for module in model.modules() if isinstance(module, QuantisedLinear)]


@pytest.mark.parametrize("name", FORMATS)
def test_losses_and_gradients_are_the_dequantised_model_s(name: str) -> None:
    ours = tune(quantised_base(name, exact=3))
    dense = tune(dequantise(quantised_base(name, exact=3)))
    for mine, its in zip(layers(ours), layers(dense), strict=True):
        its.neuroada_idx["default"].data = mine.neuroada_idx["default"].data.clone()
        values = torch.randn_like(mine.neuroada_delta["default"]) * 0.01
        mine.neuroada_delta["default"].data, its.neuroada_delta["default"].data = values, values.clone()
    before = packed(ours)
    loss, expected = (model(input_ids=X, labels=X).loss for model in (ours, dense))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for mine, its in zip(layers(ours), layers(dense), strict=True):
        mine, its = mine.neuroada_delta["default"].grad, its.neuroada_delta["default"].grad
        assert its.abs().max() > 0
        assert (mine - its).norm() <= 1e-6 * its.norm()
    assert all(now.equal(then) for now, then in zip(packed(ours), before, strict=True))


def test_a_quantised_linear_alone_is_its_dense_self() -> None:
    base = quantised_base("nf4", exact=2)
    assert sum(isinstance(module, QuantisedLinear) for module in base.modules()) == 14
    assert isinstance(base.lm_head, nn.Linear)
    assert logits(base).equal(logits(dequantise(copy.deepcopy(base))))


@pytest.mark.parametrize("k", [2, 4])
def test_connections_are_the_original_s_where_they_are_exact(k: int) -> None:
    original = make_base(**SIZES).bfloat16()  # as checkpoints are; of fp32, those that round to the same would tie
    tuned = tune(quantise(copy.deepcopy(original), Quantisation("nf4", 4)), k)
    for layer in layers(tuned):
        idx = unpack_indices(layer.neuroada_idx["default"])
        assert idx.equal(select_top_k(original.get_submodule(layer.name).weight, k, "magnitude"))


def test_two_threads_with_two_adapters_over_one_base() -> None:
    base = quantised_base("nf4", exact=3)
    pair = [train_a_little(tune(copy.copy(base)), steps=1) for _ in range(1)]
    layer = layers(pair[0])[0]
    twin = NeuroAdaLinear(layer.base_layer, layer.name)
    twin.add_adapter("default", NeuroAdaConfig(k=3))
    twin.set_adapter("default")
    twin.neuroada_delta["default"].data.fill_(0.3)
    x = torch.randn(40, 64)
    with torch.no_grad():
        expected, found = [one(x) for one in (layer, twin)], ([], [])

    def work(one: nn.Module, results: list) -> None:
        with torch.no_grad():
            results.extend(one(x) for _ in range(10))

    threads = [threading.Thread(target=work, args=(one, found[i])) for i, one in enumerate((layer, twin))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, right in zip(found, expected, strict=True):
        assert len(outputs) == 10
        assert all(output.equal(right) for output in outputs)
    assert not expected[0].equal(expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_what_was_trained_to_the_bit(dtype: torch.dtype) -> None:
    tuned = train_a_little(tune(quantised_base("nf4", exact=3, dtype=dtype)))
    trained = logits(tuned)
    before = [layer.base_values("default").clone() for layer in layers(tuned)]
    tuned.merge_adapter()
    assert logits(tuned).equal(trained)
    tuned.unmerge_adapter()
    assert logits(tuned).equal(trained)
    assert all(layer.base_values("default").equal(then) for layer, then in zip(layers(tuned), before, strict=True))
    merged = tuned.merge_and_unload()
    assert logits(merged).equal(trained)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


def test_an_adapter_is_loaded_over_the_base_it_was_trained_on(tmp_path: Path) -> None:
    tuned = train_a_little(tune(quantised_base("nf4", exact=3)))
    tuned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(quantised_base("nf4", exact=3), str(tmp_path))
    assert logits(again).equal(logits(tuned))
    for base in (make_base(**SIZES), quantised_base("int8", exact=3)):
        with pytest.raises(UserError, match=r"other base weights \(base_fingerprint nf4:3:"):
            PeftModel.from_pretrained(base, str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": None}))
    PeftModel.from_pretrained(make_base(**SIZES), str(tmp_path))


def test_an_adapter_of_a_dense_base_is_refused_over_a_quantised_one(tmp_path: Path) -> None:
    train_a_little(tune(make_base(**SIZES))).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"was trained on other base weights .* here nf4:3:"):
        PeftModel.from_pretrained(quantised_base("nf4", exact=3), str(tmp_path))


def test_a_base_is_quantised_once() -> None:
    with pytest.raises(UserError, match="already quantised"):
        quantise(quantised_base("nf4"), Quantisation("int8"))
