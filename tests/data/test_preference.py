"""Losses over preference pairs against their definitions and TRL's."""

import math

import pytest
import torch

from neuroada.objectives.preference_losses import dpo_loss, odds_ratio_loss, sequence_log_probs


def test_log_probs_of_each_sequence():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 11, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 3, 4], [5, 6, -100, -100]])
    sequence = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    sums, counts = sequence_log_probs(logits, targets, sequence)
    log_probs = logits.log_softmax(-1)
    expected = [log_probs[0, 0, 1], log_probs[0, 2, 3] + log_probs[0, 3, 4], log_probs[1, 0, 5] + log_probs[1, 1, 6]]
    assert sums.tolist() == pytest.approx([float(value) for value in expected], rel=1e-6)
    assert counts.tolist() == [1, 2, 2]


def test_dpo():
    chosen, rejected = torch.tensor([-3.0, -8.0]), torch.tensor([-5.0, -2.0])
    reference = torch.tensor([-4.0, -7.0]), torch.tensor([-4.5, -2.5])
    margins = (chosen - rejected) - (reference[0] - reference[1])
    expected = [-math.log(1 / (1 + math.exp(-0.1 * margin))) for margin in margins.tolist()]
    assert dpo_loss(chosen, rejected, *reference, beta=0.1).tolist() == pytest.approx(expected, rel=1e-6)
    assert dpo_loss(*reference, *reference, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_odds_ratio():
    chosen, rejected = torch.tensor([-0.2, -1e-6]), torch.tensor([-1.5, -2.0])

    def odds(log_prob):
        return math.exp(log_prob) / -math.expm1(log_prob)

    expected = [-math.log(1 / (1 + odds(r) / odds(c))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert odds_ratio_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-4)
