"""Adapters that are not what they were saved as: refused in one line, by the file and by the model."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from streaming_models import TARGETS, adapted, save_adapter, save_base
from transformers import AutoModelForCausalLM

from neuroada import hotswap_adapter
from neuroada.adapter.adapter_file import check_finite, read_adapter, read_config
from neuroada.adapter.load import check_loaded
from neuroada.adapter.saved import save_adapter as ours
from neuroada.errors import UserError

IDS = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))


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


def by_peft(base, adapter):
    return PeftModel.from_pretrained(base, str(adapter))


def by_transformers(base, adapter):
    base.load_adapter(str(adapter))
    return base


@pytest.mark.parametrize("into", [by_peft, by_transformers])
def test_peft_and_transformers_refuse_them_too(base, saved, tmp_path, into):
    """In one line, and nothing of the adapter stays: the model can be adapted again."""
    model = AutoModelForCausalLM.from_pretrained(base)
    names = [name for name, _ in model.named_modules()]
    before = model(input_ids=IDS).logits
    for name, (edit_tensors, _) in CHANGES.items():
        folder = shutil.copytree(saved, tmp_path / name)
        change(folder, edit_tensors)
        if name == "no prefix":  # a tensor that is nobody's, as a base model's own beside the adapter is
            continue
        if name == "wide indices" and into is by_transformers:  # which makes the very same bytes of them
            continue
        if name not in ("bf16 deltas", "integer deltas", "a flipped bit"):  # which the checksum alone tells
            edit(folder, connections_sha256=None)
        if name in ("a flipped index", "one layer only", "neither"):
            edit(folder, connections_sha256="0")
        message = told(into, model, folder)
        assert "adapter 'default'" in message, name
        assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config"), name
        assert model(input_ids=IDS).logits.equal(before)
    assert into(model, saved)(input_ids=IDS).logits.equal(load(base, saved)(input_ids=IDS).logits)


def test_a_refused_adapter_leaves_the_others(base, saved, adapter):
    model = load(base, saved)
    before = model(input_ids=IDS).logits
    change(adapter, CHANGES["nan"][0])
    for name in ("second", "default"):  # a new one, and a new file into one that is there
        assert "NaN" in told(model.load_adapter, str(adapter), name)
    assert [*model.peft_config] == ["default"] and model(input_ids=IDS).logits.equal(before)
    assert "NaN" in told(hotswap_adapter, model, str(adapter), "default")
    change(adapter, lambda t: t.update(load_file(saved / "adapter_model.safetensors")))
    change(adapter, CHANGES["a flipped bit"][0])
    assert "connections_sha256" in told(hotswap_adapter, model, str(adapter), "default")
    assert model(input_ids=IDS).logits.equal(before)


def test_what_is_legal_is_loaded(base, saved, adapter, tmp_path):
    model = load(base, saved)
    model.half().save_pretrained(tmp_path / "half")  # deltas of the dtype that the user has cast them to
    for into in (by_peft, by_transformers):
        found = into(AutoModelForCausalLM.from_pretrained(base), tmp_path / "half")
        assert {param.dtype for name, param in found.named_parameters() if "neuroada_delta" in name} == {torch.float32}
    edit(adapter, connections_sha256=None)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)
    assert whole(input_ids=IDS).logits.equal(load(base, saved)(input_ids=IDS).logits)
    edit(adapter, base_fingerprint=None)
    load(base, adapter)
    # values of another file for an adapter that is there, as a trainer's checkpoint
    other = adapted(base)
    for name, param in other.named_parameters():
        if "neuroada_delta" in name:
            param.data += 1
    other.save_pretrained(tmp_path / "other")
    model = load(base, saved)
    model.load_adapter(str(tmp_path / "other"), "default", is_trainable=True)
    assert model(input_ids=IDS).logits.equal(other(input_ids=IDS).logits)
    # an adapter that was changed in memory, copied under another name
    state = get_peft_model_state_dict(model)
    model.add_adapter("twin", model.peft_config["default"])
    set_peft_model_state_dict(model, state, "twin")
    model.set_adapter("twin")
    assert model(input_ids=IDS).logits.equal(other(input_ids=IDS).logits)


def test_transformers_refuses_an_adapter_of_other_weights(base, saved):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].self_attn.q_proj.weight.data += 1
    assert "trained on other base weights" in told(model.load_adapter, str(saved))
    assert not hasattr(model, "peft_config")


def load(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def test_a_model_tells_which_tensors_its_adapters_file_lacks(base, adapter):
    model = load(base, adapter)
    check_loaded(model, adapter)
    change(adapter, lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key])
    edit(adapter, connections_sha256=None)  # nothing but the model knows how many layers there are
    assert "lacks 6 of the adapter's tensors" in told(check_loaded, model, adapter)
    assert "lacks the connections of 3 of 6 modules" in told(load, base, adapter)


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
