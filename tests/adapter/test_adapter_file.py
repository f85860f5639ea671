"""Adapters that are not what they were saved as: refused in one line, by the file and by the model."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from streaming_models import TARGETS, save_adapter, save_base
from transformers import AutoModelForCausalLM

from neuroada.adapter.adapter_file import check_finite, read_adapter, read_config
from neuroada.adapter.load import check_loaded
from neuroada.adapter.saved import save_adapter as ours
from neuroada.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model", shards=False)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change(folder, edit_tensors):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit_tensors(tensors)
    save_file(tensors, path)


def told(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


def drop(kind):
    return lambda tensors: tensors.pop(f"{MODULE}.neuroada_{kind}")


def rename(tensors):
    tensors[f"{MODULE}.nueroada_delta"] = tensors.pop(f"{MODULE}.neuroada_delta")


def put(kind, value):
    def edit_tensors(tensors):
        tensors[f"{MODULE}.neuroada_{kind}"] = value(tensors[f"{MODULE}.neuroada_{kind}"])

    return edit_tensors


def flip(tensor):
    tensor.view(torch.uint8).view(-1)[0] ^= 1
    return tensor


def repeat(tensor):
    tensor[0, 2:4] = tensor[0, 0:2]
    return tensor


def poison(value):
    def edit_tensor(tensor):
        tensor[3, 1] = value
        return tensor

    return edit_tensor


CHANGES = {
    "no idx": (drop("idx"), "deltas and no indices"),
    "no delta": (drop("delta"), "indices and no deltas"),
    "neither": (lambda t: (drop("idx")(t), drop("delta")(t)), "connections_sha256 differs"),
    "renamed": (rename, "indices and no deltas"),
    "one layer only": (lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key], "connections_sha256 differs"),
    "no layer": (lambda t: t.clear(), "holds no connections"),
    "nan": (put("delta", poison(float("nan"))), "NaN or infinity"),
    "infinite": (put("delta", poison(float("-inf"))), "NaN or infinity"),
    "a flipped bit": (put("delta", flip), "connections_sha256 differs"),
    "a flipped index": (put("idx", flip), "connections_sha256 differs"),
    "integer deltas": (put("delta", lambda t: t.int()), "expected"),
    "bf16 deltas": (put("delta", lambda t: t.bfloat16()), "bfloat16, expected"),
    "wide indices": (put("idx", lambda t: t.long()), "expected [out, 6] uint8"),
    "fewer rows": (put("delta", lambda t: t[:-1].contiguous()), "expected [48, 3] float32"),
    "another k": (put("idx", lambda t: t[:, :4].contiguous()), "expected [out, 6] uint8 (k = 3)"),
    "a connection twice": (put("idx", repeat), "twice in one row"),
    "no prefix": (lambda t: t.update({"x": torch.ones(1)}), "does not begin with"),
    "another module": (
        lambda t: t.update({key.replace("q_proj", "v_proj"): t[key].clone() for key in list(t) if "q_proj" in key}),
        "which target_modules in adapter_config.json does not name",
    ),
    "a target less": (lambda t: [t.pop(key) for key in list(t) if "o_proj" in key],
                      "nothing for target_modules' o_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused(adapter, name):
    edit_tensors, said = CHANGES[name]
    change(adapter, edit_tensors)
    message = told(read_adapter, adapter)
    assert message.startswith(str(adapter / "adapter_model.safetensors")) and said in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"k": True}, "k = True"),
        ({"k": 4}, "k = 4"),
        ({"k": 0}, "k = 0"),
        ({"k": "3"}, "k = '3'"),
        ({"peft_type": "LORA"}, "LORA, not NEUROADA"),
        ({"peft_type": None}, "peft_type = None"),
        ({"target_modules": 7}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "does not name"),
        ({"target_modules": [*TARGETS, "up_proj"]}, "nothing for target_modules' up_proj"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
        ({"selection": "best"}, "selection = 'best'"),
        ({"connections_sha256": "0"}, "connections_sha256 differs"),
    ],
)
def test_a_changed_configuration_is_refused(adapter, fields, said):
    edit(adapter, **fields)
    assert said in told(read_adapter, adapter)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"k": 3}', '{"k": 3, "k": 4}', "{" * 9999, '"\\ud800"'])
def test_a_configuration_that_is_none_is_one_line(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    assert told(read_config, adapter).startswith(str(adapter / "adapter_config.json"))


def test_a_whole_adapter_is_read(adapter):
    found = read_adapter(adapter)
    assert len(found.connections) == 2 * len(TARGETS) and not found.whole and found.config.k == 3
    assert told(read_config, adapter / "nowhere").endswith("save the adapter again")


@pytest.mark.filterwarnings("error::UserWarning")
def test_every_way_of_saving_records_the_checksum_again(base, adapter, tmp_path):
    model = load(base, adapter)
    for name, param in model.named_parameters():
        if "neuroada_delta" in name:
            param.data += 1
    model.save_pretrained(tmp_path / "peft")
    ours(model, tmp_path / "ours")
    found = [read_adapter(tmp_path / name).config.connections_sha256 for name in ("peft", "ours")]
    assert found[0] == found[1] != read_adapter(adapter).config.connections_sha256
    model.load_adapter(str(adapter), "second")
    model.save_pretrained(tmp_path / "two")
    assert read_adapter(tmp_path / "two" / "second").config == read_adapter(adapter).config


def test_a_file_without_the_checksum_is_read_with_a_warning(adapter):
    edit(adapter, connections_sha256=None)
    with pytest.warns(UserWarning, match="connections_sha256"):
        read_adapter(adapter)


def load(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def test_a_model_tells_which_tensors_its_adapters_file_lacks(base, adapter):
    check_loaded(load(base, adapter), adapter)
    change(adapter, lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key])
    edit(adapter, connections_sha256=None)  # nothing but the model knows how many layers there are
    model = load(base, adapter)
    assert "lacks the connections of 3 modules" in told(check_loaded, model, adapter)


def test_other_methods_adapters_are_checked_too(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    check_loaded(load(base, tmp_path / "lora"), tmp_path / "lora")
    assert read_config(tmp_path / "lora").peft_type == "LORA"
    change(tmp_path / "lora", lambda t: t.update({f"{MODULE}.lora_Z.weight": t.pop(f"{MODULE}.lora_A.weight")}))
    assert f"lacks 1 of the adapter's tensors, {MODULE}.lora_A.weight" in told(
        check_loaded, load(base, tmp_path / "lora"), tmp_path / "lora"
    )
    change(tmp_path / "lora", lambda t: t.update({f"{MODULE}.lora_A.weight": t.pop(f"{MODULE}.lora_Z.weight")}))
    check_finite(tmp_path / "lora")
    change(tmp_path / "lora", lambda t: t[f"{MODULE}.lora_A.weight"].fill_(float("nan")))
    assert "NaN" in told(check_finite, tmp_path / "lora")
