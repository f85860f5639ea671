"""A micro batch of sequences as the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuroada.data.encoding import Tokens

IGNORED = -100
"""The target of a position that carries no loss."""


@dataclass(frozen=True)
class Collated:
    """What one forward pass takes.

    inputs: the model's keyword arguments; among them `logits_to_keep`, the columns whose next token some row is to be
        scored on, so that logits exist only there.
    targets: [rows, len(logits_to_keep)] int64, -100 where that position carries no loss.
    sequence: [rows, len(logits_to_keep)] int64: the sequence, in the order given, that a position belongs to.
    tokens: real tokens, without padding.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    sequence: torch.Tensor
    tokens: int


def collate(sequences: Sequence[Tokens], packed: bool, pad_id: int) -> Collated:
    """Sequences end to end in one row (packed), or below each other, padded on the right.

    The token at p is predicted at p - 1. Labels and padding are told by position, never by a token's id.
    """
    rows = [torch.from_numpy(one.ids.astype("int64")) for one in sequences]
    labels = [_targets(row, torch.from_numpy(one.learnt.copy())) for row, one in zip(rows, sequences, strict=True)]
    owners = [torch.full_like(row, number) for number, row in enumerate(rows)]
    if packed:
        ids, label, owner = torch.cat(rows)[None], torch.cat(labels)[None], torch.cat(owners)[None]
        # Positions that start again at 0 tell the attention where a sequence begins.
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None]}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, label, owner = pad(rows, True, pad_id), pad(labels, True, IGNORED), pad(owners, True, 0)
        inputs = {"input_ids": ids, "attention_mask": pad([torch.ones_like(row) for row in rows], True, 0)}
    keep = (label != IGNORED).any(0).nonzero().flatten()
    inputs["logits_to_keep"] = keep
    return Collated(inputs, label[:, keep], owner[:, keep], sum(map(len, rows)))


def _targets(ids: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    following = torch.where(learnt, ids, IGNORED)[1:]
    return torch.cat([following, following.new_full((1,), IGNORED)])
