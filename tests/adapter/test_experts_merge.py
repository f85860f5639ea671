"""Experts merged from files: the bits of the merge in memory, and the base's own back again."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_experts import attach, gpt_oss, qwen, train
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from neuroada.adapter.load import load_adapter
from neuroada.errors import UserError
from neuroada.offline.merge import merge, unmerge


def mixtral() -> nn.Module:
    """Its files name experts' matrices in another way."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)).eval()  # fmt: skip


def write(make, tmp_path: Path) -> PeftModel:
    """The base in bf16, an adapter of it, and the adapted model."""
    base = make().bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned = train(attach(base, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned


@pytest.mark.parametrize("make", [qwen, gpt_oss, mixtral])
def test_merged_from_files_to_the_bit(make, tmp_path: Path) -> None:
    tuned = write(make, tmp_path)
    done = merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", verify=True)
    assert done["layers"] == 6 and done["base_fingerprint"] == "same" and done["verified"]
    tuned.merge_and_unload().save_pretrained(tmp_path / "expected")
    base, expected, found = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "expected", "merged")
    )
    assert found.keys() == expected.keys() == base.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert any("experts" in name and not found[name].equal(base[name]) for name in base)
    unmerge(tmp_path / "merged", tmp_path / "again")
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


def test_an_adapter_of_experts_is_loaded_strictly(tmp_path: Path) -> None:
    write(qwen, tmp_path)
    base = qwen().bfloat16()
    load_adapter(copy.deepcopy(base), tmp_path / "adapter", "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(UserError, match=r"holds model\.layers\..*gate_up_proj, which target_modules"):
        load_adapter(base, tmp_path / "adapter", "base")


@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_another_base_is_refused(make, tmp_path: Path) -> None:
    write(make, tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "experts" in name and "down_proj" in name and "bias" not in name)
    save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})
    with pytest.raises(UserError, match="was trained on other base weights"):
        merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor|lacks|missing"):
        merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
