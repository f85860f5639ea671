"""ORPO against TRL's ORPOTrainer: the same model, adapter, pairs and order; ten steps.

Its cross-entropy is over the prompt as well, ours over the chosen answer, as in the paper: that one term is computed
here, over the labels that TRL has made. All else is TRL's: tokens, log-probabilities, odds ratio, sum, optimizer.
"""

from pathlib import Path

import pytest
import torch.nn.functional as F
from test_dpo_trl import STEPS, ours, trls


def test_orpo_is_trls(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0")
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this trl has no ORPOTrainer")

    class OfTheAnswer(orpo.ORPOTrainer):
        def concatenated_forward(self, model, batch):
            chosen, rejected, logits, more, _ = super().concatenated_forward(model, batch)
            labels = batch["chosen_labels"]
            labels = F.pad(labels, (0, logits.shape[1] + 1 - labels.shape[1]), value=-100)[:, 1:]
            return chosen, rejected, logits, more, F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    expected = trls(tmp_path, tiny, OfTheAnswer, orpo.ORPOConfig, remove_unused_columns=False)
    found = ours(tmp_path, tiny, "orpo")
    assert len(expected) == STEPS
    assert found[-1] < found[0] - 0.05
    assert found == pytest.approx(expected, abs=1e-4)
