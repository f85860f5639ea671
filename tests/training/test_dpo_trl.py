"""DPO against TRL's DPOTrainer: the same model, adapter, pairs and order; ten steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import losses

from neuroada.config.recipe import load_recipe
from neuroada.data.mixing import Order
from neuroada.training.trainer import train

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
STEPS, BATCH, LR = 10, 4, 5e-3
PAIRS = [
    {"prompt": f"{i} plus {i + 1} is ", "chosen": f"{2 * i + 1}" + " indeed" * (i % 4), "rejected": "no" * (1 + i % 3)}
    for i in range(24)
]


def ours(tmp_path: Path, tiny: Path, objective: str = "dpo") -> list[float]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    recipe = load_recipe("tiny_arithmetic", [
        f"model={tiny}", "task=null", f"data.datasets=[{{path: {path}}}]", f"data_dir={tmp_path}",
        f"output_dir={tmp_path / 'run'}", f"objective={{name: {objective}, beta: 0.3}}", "engine.name=single",
        f"adapter.target_modules={TARGETS}", f"optimizer={{lr: {LR}, schedule: constant}}", "train.epochs=9",
        f"train.max_steps={STEPS}", f"train.global_batch_size={BATCH}", "train.micro_batch_size=2", "train.seed=7",
    ])  # fmt: skip
    train(recipe)
    return list(losses(tmp_path / "run").values())


def trls(tmp_path: Path, tiny: Path, trainer_class: type, config_class: type, **options: Any) -> list[float]:
    """The losses of ten steps of a trainer of TRL's."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from neuroada import NeuroAdaConfig

    order = [int(i) for step in range(STEPS) for i in Order((len(PAIRS),), seed=7).batch(step, BATCH)]
    found: list[float] = []

    class Recording(trainer_class):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            found.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = get_peft_model(base, NeuroAdaConfig(k=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    args = config_class(
        output_dir=str(tmp_path / "trl"), beta=0.3, learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0,
        per_device_train_batch_size=BATCH, max_steps=STEPS, weight_decay=0.0, max_grad_norm=1.0, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="sequential", report_to=[], use_cpu=True, logging_steps=1,
        save_strategy="no", max_length=256, **options,
    )  # fmt: skip
    dataset = Dataset.from_list([PAIRS[i] for i in order])
    trainer = Recording(
        model=model, args=args, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(tiny)
    )
    trainer.train()
    return found


def test_dpo_is_trls(tmp_path: Path, tiny: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0")
    expected = trls(tmp_path, tiny, trl.DPOTrainer, trl.DPOConfig)
    found = ours(tmp_path, tiny)
    assert len(expected) == STEPS
    assert found[0] == pytest.approx(0.6931, abs=1e-4) and found[-1] < found[0] - 0.05
    assert found == pytest.approx(expected, abs=1e-4)
