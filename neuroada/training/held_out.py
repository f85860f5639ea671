"""Questions of the training set that are never trained on: what the answer loss on unseen questions is measured on."""

import numpy as np
import torch
from torch import nn

from neuroada.errors import UserError
from neuroada.tasks.data import question_key
from neuroada.tasks.encode import Encoded
from neuroada.tasks.table import Example
from neuroada.training.batches import collate
from neuroada.training.loss import answer_loss

SEED = 0  # not the run's: every run of a comparison holds out the same questions


def hold_out(examples: list[Example], questions: int) -> tuple[list[Example], list[Example], list[Example]]:
    """(train, choose, report): two disjoint parts of `questions` distinct questions each, and every row of the others.

    The first part chooses between runs (a learning rate, say), the second is reported. A question that stands in
    several rows is held out with all of them; its first row is the one measured.
    """
    if not questions:
        return examples, [], []
    first = {question_key(example): example for example in reversed(examples)}
    if 2 * questions >= len(first):
        raise UserError(f"train.held_out = {questions}: twice as many are held out, and there are only {len(first)}")
    keys = sorted(first)
    chosen = [keys[i] for i in np.random.default_rng(SEED).permutation(len(keys))[: 2 * questions]]
    apart = set(chosen)
    train = [example for example in examples if question_key(example) not in apart]
    choose, report = ([first[key] for key in part] for part in (chosen[:questions], chosen[questions:]))
    return train, choose, report


def mean_answer_loss(model: nn.Module, data: Encoded, pad_id: int, rows: int = 8) -> float:
    """Cross-entropy per answer token, in nats, over all of `data`."""
    order, tokens, total = np.argsort(data.lengths, kind="stable"), int(data.num_answer_tokens.sum()), 0.0
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(order), rows):
            batch = collate(data, order[start : start + rows], packing=False, pad_id=pad_id).to(device)
            total += answer_loss(model, batch, tokens).item()
    return total
