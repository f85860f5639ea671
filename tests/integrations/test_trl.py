"""TRL's trainers over NeuroAda, on a tiny model."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_transformers import change, logits, tuned
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from neuroada import NeuroAdaConfig

trl = pytest.importorskip("trl")

SETTINGS = {"report_to": [], "use_cpu": True, "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
            "per_device_train_batch_size": 2, "bf16": False, "learning_rate": 1e-2}  # fmt: skip
PAIRS = Dataset.from_list([{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(8)])
TEXTS = Dataset.from_list([{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)])


@pytest.fixture
def tokenizer(tiny: Path):
    return AutoTokenizer.from_pretrained(tiny)


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(tiny: Path, tmp_path: Path, tokenizer, packing: bool) -> None:
    arguments = trl.SFTConfig(str(tmp_path), packing=packing, max_length=32, **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    options = {"peft_config": NeuroAdaConfig(k=2, task_type="CAUSAL_LM"), "processing_class": tokenizer}
    trainer = trl.SFTTrainer(model, arguments, train_dataset=TEXTS, **options)
    assert len(losses(trainer)) == 2
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "saved")
    assert logits(loaded).equal(logits(trainer.model))


@pytest.mark.parametrize("adapter", ["new", "in memory", "from disk"])
def test_dpo_starts_from_its_own_reference(tiny: Path, tmp_path: Path, tokenizer, adapter: str) -> None:
    """Over an adapter tuned before, the reference is that adapter, not the base: the first loss is log 2."""
    model, options = AutoModelForCausalLM.from_pretrained(tiny), {}
    if adapter == "new":
        options = {"peft_config": NeuroAdaConfig(k=2, task_type="CAUSAL_LM")}
    else:
        model = change(tuned(tiny), 3)
        if adapter == "from disk":
            model.save_pretrained(tmp_path / "sft")
            base = AutoModelForCausalLM.from_pretrained(tiny)
            model = PeftModel.from_pretrained(base, tmp_path / "sft", is_trainable=True)
    arguments = trl.DPOConfig(str(tmp_path), max_length=32, **SETTINGS)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=tokenizer, **options)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=2e-4)
    trainer.save_model(str(tmp_path / "saved"))


def test_grpo(tiny: Path, tmp_path: Path, tokenizer) -> None:
    arguments = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=PAIRS.select_columns(["prompt"]),
        peft_config=NeuroAdaConfig(k=2, task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.model.unload().model.layers[0].self_attn.q_proj.weight.equal(before)


def test_reward(tiny: Path, tmp_path: Path, tokenizer) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    arguments = trl.RewardConfig(str(tmp_path), max_length=32, **SETTINGS)
    config = NeuroAdaConfig(k=2, task_type="SEQ_CLS")
    trainer = trl.RewardTrainer(
        get_peft_model(model, config), arguments, train_dataset=PAIRS, processing_class=tokenizer
    )
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
