"""Bases quantised by bitsandbytes or torchao: trained over, merged, and loaded again through PEFT."""

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from tiny_models import X, logits, make_base, train_a_little
from torch import nn

from neuroada import NeuroAdaConfig
from neuroada.adapter import NeuroAdaLinear
from neuroada.errors import UserError


def nf4(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def int8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def torchao(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    linear.requires_grad_(False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return linear


def base(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = make_base()
    for name in [name for name, _ in model.named_modules() if name.endswith(("q_proj", "up_proj"))]:
        model.set_submodule(name, make(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("make", [nf4, int8, torchao])
def test_trained_merged_and_loaded(make: Callable, tmp_path: Path) -> None:
    config = NeuroAdaConfig(k=3, target_modules=["q_proj", "up_proj"])
    tuned = get_peft_model(base(make), config)
    layers = [module for module in tuned.modules() if isinstance(module, NeuroAdaLinear)]
    before = [layer.base_values("default").clone() for layer in layers]
    loss = tuned(input_ids=X, labels=X).loss
    tuned = train_a_little(tuned)
    assert tuned(input_ids=X, labels=X).loss < loss
    assert all(layer.base_values("default").equal(then) for layer, then in zip(layers, before, strict=True))
    tuned.save_pretrained(str(tmp_path))
    expected = logits(tuned)
    assert logits(PeftModel.from_pretrained(base(make), str(tmp_path))).equal(expected)
    with pytest.raises(UserError, match="other base weights"):
        PeftModel.from_pretrained(make_base(), str(tmp_path))
    assert logits(tuned.merge_and_unload()).equal(expected)
