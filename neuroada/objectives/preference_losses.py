"""Losses over pairs of answers, as functions of their log-probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sequence_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, sequence: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability of each sequence's learnt tokens, and how many those are: [sequences] fp32 and int64.

    logits [rows, positions, vocabulary]; targets [rows, positions] int64, -100 where there is no loss; sequence
    [rows, positions] int64, the sequence of each position; each sequence has a learnt token.
    """
    scored = targets != -100
    chosen, owner = targets[scored], sequence[scored]
    values = logits[scored].float()
    log_probs = values.gather(1, chosen[:, None]).squeeze(1) - values.logsumexp(1)
    counts = torch.bincount(owner)
    return torch.zeros(len(counts), device=logits.device).index_add(0, owner, log_probs), counts


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al., 2023, equation 7): [pairs].

    Summed log-probabilities [pairs] of the answers, under the model and under the reference, which is the same model
    with its adapter off.
    """
    return -F.logsigmoid(beta * ((chosen - rejected) - (reference_chosen - reference_rejected)))


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """ORPO's odds-ratio term (Hong et al., 2024, equation 6), which its loss adds to the chosen answers' cross-entropy:
    [pairs].

    Mean log-probabilities per token [pairs] of the answers, below 0.
    """
    log_odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return -F.logsigmoid(log_odds)


def _log_complement(log_prob: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(log_prob)), exact near 0."""
    return torch.log(-torch.expm1(log_prob))
