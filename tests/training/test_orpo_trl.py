"""ORPO against TRL's ORPOTrainer: the same model, adapter, pairs and order; ten steps.

Its cross-entropy is over the prompt as well, ours over the chosen answer, as in the paper: that one term is computed
here, over the labels that TRL has made. All else is TRL's: tokens, log-probabilities, odds ratio, sum, optimizer.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_dpo_trl import BATCH, LR, PAIRS, STEPS, TARGETS, ours

from neuroada.data.mixing import Order


def trls(tmp_path: Path, tiny: Path) -> list[float]:
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0")
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this trl has no ORPOTrainer")
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from neuroada import NeuroAdaConfig

    order = [int(i) for step in range(STEPS) for i in Order((len(PAIRS),), seed=7).batch(step, BATCH)]
    found: list[float] = []

    class OfTheAnswer(orpo.ORPOTrainer):
        def concatenated_forward(self, model, batch):
            chosen, rejected, logits, more, _ = super().concatenated_forward(model, batch)
            labels = batch["chosen_labels"]
            labels = F.pad(labels, (0, logits.shape[1] + 1 - labels.shape[1]), value=-100)[:, 1:]
            return chosen, rejected, logits, more, F.cross_entropy(logits.flatten(0, 1), labels.flatten())

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            found.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = get_peft_model(base, NeuroAdaConfig(k=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    args = orpo.ORPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0,
        per_device_train_batch_size=BATCH, max_steps=STEPS, weight_decay=0.0, max_grad_norm=1.0, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="sequential", report_to=[], use_cpu=True, logging_steps=1,
        save_strategy="no", max_length=256, remove_unused_columns=False,
    )  # fmt: skip
    dataset = Dataset.from_list([PAIRS[i] for i in order])
    trainer = OfTheAnswer(
        model=model, args=args, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(tiny)
    )
    trainer.train()
    return found


def test_orpo_is_trls(tmp_path: Path, tiny: Path) -> None:
    expected = trls(tmp_path, tiny)
    found = ours(tmp_path, tiny, "orpo")
    assert len(expected) == STEPS
    assert found[-1] < found[0] - 0.05
    assert found == pytest.approx(expected, abs=1e-4)
