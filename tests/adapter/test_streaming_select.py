"""Selecting from files gives select_top_k's choice, and a training can start from it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming_models import TARGETS, adapted, save_base
from transformers import AutoModelForCausalLM

from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.selection_file import apply_selection, load_selection
from neuroada.errors import UserError
from neuroada.hf import tensor_files
from neuroada.offline.select import select
from neuroada.ops import selection as rules
from neuroada.ops import unpack_indices


def plain_top_k(weight: torch.Tensor, k: int, selection: str, seed: int) -> torch.Tensor:
    """By one stable sort of each row."""
    if selection == "random":
        keys = rules._keys(weight, "random", 0, seed)
    else:
        keys = weight.double().abs() * (-1 if selection == "reverse" else 1)
    return keys.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", ["magnitude", "reverse", "random"])
def test_groups_change_no_choice(
    dtype: torch.dtype, selection: rules.Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, widths that the groups do not divide, every k from one connection to all, chunks of a few rows."""
    monkeypatch.setattr(rules, "CPU_CHUNK", 700)
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 7, 64, 250, 577):
        weight = (torch.randn(9, columns, generator=generator) * 8).round().div(8).to(dtype)
        for k in sorted({1, math.isqrt(columns), columns // 4 or 1, columns}):
            found = rules.select_top_k(weight, k, selection, seed=3)
            assert torch.equal(found, plain_top_k(weight, k, selection, 3)), (columns, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["magnitude", "reverse", "random"])
@pytest.mark.parametrize("workers", [1, 2])
def test_same_choice_as_on_the_loaded_model(
    tmp_path: Path, dtype: torch.dtype, selection: rules.Selection, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK", 1000)
    base = save_base(tmp_path / "base", dtype)
    done = select(base, 5, tmp_path / "s.safetensors", selection=selection, seed=7, workers=workers)
    modules = dict(AutoModelForCausalLM.from_pretrained(base, dtype="auto").named_modules())
    found = load_selection(tmp_path / "s.safetensors")
    assert len(found) == 14 == done["layers"]  # seven projections of two layers
    for name, idx in found.items():
        weight = modules[name].weight.data
        assert torch.equal(unpack_indices(idx), rules.select_top_k(weight, 5, selection, seed=7)), name
    assert (tmp_path / "s.safetensors").stat().st_size == done["bytes"] < 2 * done["connections"] + 4096


@pytest.mark.parametrize("name", ["model.", ""])
def test_an_adapter_starts_from_the_file(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base", tied=True)
    if not name:  # a base saved without its head
        AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(tmp_path / "bare")
    source = base if name else tmp_path / "bare"
    file = tmp_path / "s.safetensors"
    select(source, 3, file, selection="reverse", target_modules=TARGETS)
    model = adapted(base)
    apply_selection(model.base_model, "default", file)
    expected = adapted(base, selection="reverse")
    layers = model.base_model.adapted_layers("default")
    assert fingerprint(layers, "default") == fingerprint(expected.base_model.adapted_layers("default"), "default")
    assert model.peft_config["default"].selection == "reverse"
    assert f"{name}layers.0.self_attn.q_proj" in load_selection(file)


def test_the_fingerprint_is_an_adapters(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    done = select(base, 3, tmp_path / "s.safetensors", target_modules=TARGETS)
    assert done["base_fingerprint"] == fingerprint(adapted(base).base_model.adapted_layers("default"), "default")


def test_a_selection_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    file = tmp_path / "s.safetensors"
    select(base, 3, file, target_modules=TARGETS)

    def refused(pattern: str, path: Path = file, **options: object) -> None:
        with pytest.raises(UserError, match=pattern):
            apply_selection(adapted(base, **options).base_model, "default", path)

    refused("k = 3, the adapter has k = 4", k=4)
    refused("no connections for .*v_proj", target_modules=[*TARGETS, "v_proj"])
    refused("does not train", target_modules=["q_proj"])
    other = adapted(base)
    other.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight.data += 1
    with pytest.raises(UserError, match="other weights"):
        apply_selection(other.base_model, "default", file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    refused("sha256", damaged)
    save_file(load_file(file), damaged)
    refused("not a selection file", damaged)
    refused("no such file", tmp_path / "none")


def test_arguments_that_do_not_fit_the_model(tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base"), tmp_path / "x"
    with pytest.raises(UserError, match="has only 48 inputs; choose k <= 48"):
        select(base, 49, out)
    with pytest.raises(UserError, match="q_prj: no such weight matrix; there are q_proj"):
        select(base, 2, out, target_modules=["q_prj"])
    (base / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(UserError, match="none are known for model_type other"):
        select(base, 2, out)
    assert not out.exists()


def test_the_command(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")

    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/select_connections.py", "--model", str(base), *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    out = tmp_path / "s.safetensors"
    done = run("--k", 2, "--out", out, "--target-modules", "q_proj", "v_proj", "--workers", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["connections"] == 2 * 2 * (48 + 24)
    for argv, pattern in (
        (["--k", 2, "--out", out], "is already there"),
        (["--k", 0, "--out", tmp_path / "x"], "--k 0"),
    ):
        failed = run(*argv)
        assert failed.returncode == 2 and pattern in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_the_commands_folder_does_not_hide_pythons_select_module() -> None:
    code = "import sys; sys.path.insert(0, 'launch'); import select; print(select.select)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "built-in function select" in done.stdout, done.stderr
