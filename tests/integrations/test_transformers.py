"""What transformers does with adapters, with NeuroAda's: its own loading, pipelines, and the Trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import run_ranks
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from neuroada import NeuroAdaConfig

IDS = torch.randint(0, 200, (16, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def tuned(tiny: Path, **config) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return get_peft_model(base, NeuroAdaConfig(**{"k": 4, "task_type": "CAUSAL_LM", **config}))


def change(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "neuroada_delta" in name:
            param.data.copy_(0.05 * torch.randn(param.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_transformers_own_loading(tiny: Path, tmp_path: Path) -> None:
    model = change(tuned(tiny))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")).equal(expected)
    assert logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")).equal(expected)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    base.load_adapter(str(tmp_path / "adapter"))
    assert logits(base).equal(expected)
    write = pipeline("text-generation", model=str(tmp_path / "adapter"), tokenizer=AutoTokenizer.from_pretrained(tiny))
    assert logits(write.model).equal(expected)


def test_transformers_own_adding(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.add_adapter(NeuroAdaConfig(k=3))
    expected = logits(change(model))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path)).equal(expected)
    model.disable_adapters()
    assert logits(model).equal(logits(AutoModelForCausalLM.from_pretrained(tiny)))


def test_a_saved_adapter_says_what_to_import(tiny: Path, tmp_path: Path) -> None:
    """First of all, by PEFT's saving and by transformers'; written twice it is there once, and a foreign card stays."""
    model = tuned(tiny)
    model.save_pretrained(tmp_path / "peft")
    model.save_pretrained(tmp_path / "peft")
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    plain.add_adapter(NeuroAdaConfig(k=3))
    plain.save_pretrained(tmp_path / "transformers")
    for name in ("peft", "transformers"):
        text = (tmp_path / name / "README.md").read_text()
        _, head, body = text.split("---\n", 2)
        assert body.lstrip().startswith("**Before loading: `import neuroada`.**") and text.count("Before loading") == 1
        assert "library_name: peft" in head and "- neuroada" in head
    card = tmp_path / "configuration" / "README.md"
    NeuroAdaConfig(k=3).save_pretrained(str(card.parent))
    assert not card.exists()


def test_without_the_import_peft_names_the_method_alone(tiny: Path, tmp_path: Path) -> None:
    """The day that PEFT finds a method by itself, docs/compatibility.md and the card may say less."""
    tuned(tiny).save_pretrained(tmp_path)
    script = "import sys, peft; peft.PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "KeyError: 'NEUROADA'"


def arguments(folder: Path, **options) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1,
                "report_to": [], "use_cpu": True, "save_steps": 3, "seed": 0}  # fmt: skip
    return TrainingArguments(str(folder), **{**settings, **options})


def curve(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_trainer_resumes_the_curve_exactly(tiny: Path, tmp_path: Path) -> None:
    whole = Trainer(tuned(tiny), arguments(tmp_path / "run"), train_dataset=ROWS)
    whole.train()
    assert (tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors").exists()
    resumed = Trainer(tuned(tiny), arguments(tmp_path / "again"), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert {step: loss for step, loss in curve(resumed).items() if step > 3} == {
        step: loss for step, loss in curve(whole).items() if step > 3
    }


def test_trainer_loads_the_best_model_at_the_end(tiny: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 0.1}
    trainer = Trainer(tuned(tiny), arguments(tmp_path, **options), train_dataset=ROWS[:8], eval_dataset=ROWS[8:])
    trainer.train()
    best = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), trainer.state.best_model_checkpoint)
    assert logits(trainer.model).equal(logits(best))


def test_trainer_in_bf16_over_an_fp32_base(tiny: Path, tmp_path: Path) -> None:
    curves = []
    for bf16 in (False, True):
        trainer = Trainer(tuned(tiny), arguments(tmp_path, bf16=bf16, save_strategy="no"), train_dataset=ROWS)
        trainer.train()
        curves.append(curve(trainer))
    assert curves[1] == pytest.approx(curves[0], rel=1e-2) and curves[1] != curves[0]


@pytest.mark.parametrize(("engine", "bf16"), [("zero2", False), ("zero3", False), ("zero3", True), ("fsdp2", False)])
def test_trainer_saves_under_sharding(tiny: Path, tmp_path: Path, engine: str, bf16: bool) -> None:
    """On 2 gloo ranks that accelerate takes for a GPU machine's: the curve of one process, whole files from rank 0.

    bf16: weights and deltas in DeepSpeed's bf16 mode, small parameters left whole on every rank, as it does by default.
    """
    expected = Trainer(tuned(tiny), arguments(tmp_path / "one"), train_dataset=ROWS)
    expected.train()
    wanted = {"engine": engine, "model": str(tiny), "out": str(tmp_path / engine), "bf16": bf16}
    run_ranks(2, "integrations/ranks_trainer.py", wanted, tmp_path)
    said = json.loads((tmp_path / engine / "said.json").read_text())
    assert said["sharded"] == (engine != "zero2")
    found = {int(step): loss for step, loss in said["curve"].items()}
    assert found == pytest.approx(curve(expected), rel=2e-3 if bf16 else 1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16 if bf16 else torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / engine / "saved")
    near = 5e-2 if bf16 else 1e-3
    torch.testing.assert_close(logits(loaded).float(), logits(expected.model), rtol=near, atol=near)
    config = json.loads((tmp_path / engine / "saved" / "adapter_config.json").read_text())
    assert config["base_fingerprint"] == next(iter(loaded.base_model.adapted_layers("default"))).trained_on["default"]
