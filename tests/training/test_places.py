"""Where a recipe adapts: names, all-linear, modules and layers left out."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from neuroada.config.recipe import Recipe, load_recipe
from neuroada.errors import UserError
from neuroada.hf.loading import load_pretrained
from neuroada.methods import make_method
from neuroada.training.trainer import train


def recipe(tiny: Path, folder: Path, *overrides: str) -> Recipe:
    fields = [f"model={tiny}", f"output_dir={folder / 'run'}", f"data_dir={folder / 'data'}", "engine.name=single",
              "train.max_steps=1", "adapter.k=2", *overrides]  # fmt: skip
    return load_recipe("tiny_arithmetic", fields)


def adapted(tiny: Path, folder: Path, *overrides: str) -> set[str]:
    """The modules that a method adapts."""
    import torch

    method = make_method(recipe(tiny, folder, *overrides))
    method.check("single")
    model = method.attach(load_pretrained(AutoModelForCausalLM, str(tiny), torch.float32), "CAUSAL_LM")
    names = {name.removeprefix("base_model.model.model.") for name, _ in model.named_parameters()}
    return {name.partition(".neuroada_delta")[0].partition(".lora_A")[0] for name in names
            if "neuroada_delta" in name or "lora_A" in name}  # fmt: skip


SEVEN = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip


@pytest.mark.parametrize("method", ["neuroada", "lora", "dora"])
def test_places(tiny: Path, tmp_path: Path, method: str) -> None:
    every = {f"layers.{layer}.{name}" for layer in (0, 1) for name in SEVEN}
    chosen = f"adapter.method={method}"
    assert adapted(tiny, tmp_path, chosen, "adapter.target_modules=all-linear") == every
    assert adapted(tiny, tmp_path, chosen, "adapter.layers=[1]") == {name for name in every if "layers.1" in name}
    assert adapted(tiny, tmp_path, chosen, "adapter.exclude_modules=[up_proj, layers.0.self_attn.q_proj]") == {
        name for name in every if not name.endswith("up_proj") and name != "layers.0.self_attn.q_proj"
    }


def test_a_run_and_its_report(tiny: Path, tmp_path: Path) -> None:
    from neuroada.reporting import write_report

    wanted = recipe(tiny, tmp_path, "adapter.layers=[0]")
    train(wanted)
    folder = Path(wanted.output_dir)
    assert json.loads((folder / "run.json").read_text())["trainable"] == 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert "gate" in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["adapter.method=shira", "adapter.layers=[0]"],
            r"adapter.layers = \[0\]: is of neuroada, lora and dora, not of shira",
        ),
        (
            ["adapter.method=full", "adapter.exclude_modules=[x]"],
            r"adapter.exclude_modules = \['x'\]: is of neuroada, lora and dora",
        ),
        (["adapter.method=masked", "adapter.target_modules=all-linear"], "masked takes a list of names"),
    ],
)
def test_errors(tiny: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapted(tiny, tmp_path, *overrides)
