"""Merging files gives the bits of PEFT's merge_and_unload; unmerging gives the base's files back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from streaming_models import TARGETS, adapted, save_adapter, save_base
from transformers import AutoModelForCausalLM

from neuroada.hf import tensor_files
from neuroada.offline.merge import merge, unmerge

TOKENS = torch.arange(40).view(2, 20)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1000, tensor_files.BLOCK])
def test_same_bits_as_merge_and_unload(
    tmp_path: Path, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK", block)
    base = save_base(tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter")
    before = files(base)
    done = merge(adapter, base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "expected", max_shard_size="40KB")

    merged = tensors(tmp_path / "merged")
    assert same_bits(merged, tensors(tmp_path / "expected"))
    assert not same_bits(merged, tensors(base))
    assert files(base) == before
    assert files(tmp_path / "merged").keys() == before.keys()
    assert done["layers"] == 6 and done["base_fingerprint"] == "same"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [True, False])
def test_logits_equal_the_adapters(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    base = save_base(tmp_path / "base", dtype, shards=shards, tied=True)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(adapter, base, tmp_path / "merged", verify=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    with torch.inference_mode():
        assert not torch.equal(merged(TOKENS).logits, plain(TOKENS).logits)
        expected = PeftModel.from_pretrained(plain, adapter).eval()(TOKENS).logits
        assert torch.equal(merged(TOKENS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_returns_the_files_to_the_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge(adapter, base, tmp_path / "merged")
    merge(adapter, base, tmp_path / "not_kept", keep_base=False)
    unmerge(tmp_path / "merged", tmp_path / "again")
    assert files(tmp_path / "again") == files(base)
    with pytest.raises(ValueError, match="--no-keep-base"):
        unmerge(tmp_path / "not_kept", tmp_path / "again2")


def test_modules_saved_whole_replace_the_tensor(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    model = adapted(base, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", base, tmp_path / "merged", verify=True)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    found = tensors(tmp_path / "merged")["lm_head.weight"]
    assert torch.equal(found, saved.bfloat16()) and not torch.equal(found, tensors(base)["lm_head.weight"])


def test_a_base_saved_without_its_head_has_other_names(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=True)
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(bare, max_shard_size="40KB")
    assert "layers.0.mlp.down_proj.weight" in tensors(bare)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(adapter, bare, tmp_path / "merged")
    merge(adapter, base, tmp_path / "expected")
    found = {f"model.{name}": value for name, value in tensors(tmp_path / "merged").items()}
    assert same_bits(found, tensors(tmp_path / "expected"))


def test_lora_is_merged_by_peft(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", base, tmp_path / "merged", verify=True)
    assert done["method"] == "LORA"
    merged = tensors(tmp_path / "merged")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert torch.equal(merged["lm_head.weight"], tensors(base)["lm_head.weight"])
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[q_proj], tensors(base)[q_proj])


def test_the_command(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")

    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/merge.py", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    done = run("--adapter", adapter, "--out", tmp_path / "merged", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["connections"] == 3 * 2 * (48 + 48 + 48)
    again = run("--adapter", adapter, "--out", tmp_path / "merged")
    assert again.returncode == 2 and "is already there" in again.stderr and len(again.stderr.splitlines()) == 1
    for argv, pattern in (
        (["--adapter", base], "no adapter_config.json"),
        (["--adapter", adapter, "--base-model", tmp_path / "none"], "no such folder"),
        (["--unmerge", "--model", base, "--adapter", adapter], "alone"),
        ([], "--adapter DIR"),
    ):
        failed = run(*argv, "--out", tmp_path / "x")
        assert failed.returncode == 2 and pattern in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not list(tmp_path.glob(".*"))
