"""Several adapters over one quantised base: swapped, mixed in a batch, active together, combined."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_quantised_layer import TARGETS, packed, quantised_base
from tiny_models import X, logits, make_base, train_a_little

from neuroada import NeuroAdaConfig, hotswap_adapter
from neuroada.adapter.export import export_shira
from neuroada.errors import UserError
from neuroada.quantised import dequantise

CONFIG = {"k": 3, "target_modules": TARGETS}
BASES = pytest.mark.parametrize(("name", "exact"), [("nf4", 3), ("nf4", 0), ("int8", 3)])


def tuned(name: str, exact: int) -> PeftModel:
    return train_a_little(get_peft_model(quantised_base(name, exact), NeuroAdaConfig(**CONFIG))).eval()


@BASES
def test_one_s_file_takes_the_other_s_place(tmp_path: Path, name: str, exact: int) -> None:
    other = tuned(name, exact)
    other.save_pretrained(tmp_path / "other")
    model = get_peft_model(quantised_base(name, exact), NeuroAdaConfig(**CONFIG)).eval()
    assert not logits(model).equal(logits(other))
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    assert logits(model).equal(logits(other))
    model.save_pretrained(tmp_path / "again")
    hotswap_adapter(other, str(tmp_path / "again"), "default")
    dense = get_peft_model(make_base(intermediate_size=128), NeuroAdaConfig(**CONFIG))
    with pytest.raises(UserError, match="was trained on other base weights"):
        hotswap_adapter(dense, str(tmp_path / "other"), "default")
    with pytest.raises(UserError, match=r"was trained over a quantised base .* use `neuroada merge`"):
        export_shira(tmp_path / "other", tmp_path / "exported", {})


@BASES
def test_two_in_a_batch_together_and_combined(name: str, exact: int) -> None:
    model = tuned(name, exact)
    before = packed(model)
    model.add_adapter("b", NeuroAdaConfig(**CONFIG, selection="random", seed=1))
    generator = torch.Generator().manual_seed(2)
    for key, param in model.named_parameters():
        if ".neuroada_delta.b." in key:
            param.data = 0.1 * torch.randn(param.shape, generator=generator)
    alone = {adapter: adapted(model, adapter) for adapter in ("default", "b")}
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    names = [("default", "b", "__base__")[row % 3] for row in range(len(X))]
    with torch.no_grad():
        mixed = model(input_ids=X, adapter_names=names).logits
    for row, adapter in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-5, atol=1e-5)
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    combined = adapted(model, "sum")
    model.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(logits(model), combined, rtol=1e-5, atol=1e-5)
    dense = copy.deepcopy(model)
    torch.testing.assert_close(logits(dequantise(dense.merge_and_unload())), combined, rtol=1e-5, atol=1e-5)
    assert all(now.equal(then) for now, then in zip(packed(model), before, strict=True))


def adapted(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    return logits(model)
