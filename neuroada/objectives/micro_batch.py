"""Sequences of tokens as the tensors of one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Sequences(Protocol):
    """Tokenised examples: prompt, answer and EOS in one run of tokens."""

    @property
    def lengths(self) -> np.ndarray: ...  # tokens of each sequence
    @property
    def num_answer_tokens(self) -> np.ndarray: ...  # those that carry a loss
    def __len__(self) -> int: ...
    def tokens(self, index: int) -> np.ndarray: ...
    def answer_start(self, index: int) -> int: ...


class Labelled(Protocol):
    """One sequence with a mask: ids [tokens] int32, learnt [tokens] bool, False at the first."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def learnt(self) -> np.ndarray: ...


@dataclass
class MicroBatch:
    """What one forward pass of a rank takes.

    inputs: the model's keyword arguments. Of a causal language model among them `logits_to_keep`, the positions
        (columns) whose next token some row is to be scored on, so that logits exist only there.
    targets: of a causal language model [rows, len(logits_to_keep)] int64, -100 where that position carries no loss; of
        a classifier [rows] fp32, class numbers or values.
    tokens: real tokens, without padding.
    sequence: of a causal language model, the shape of targets, int64: the sequence of each position, counted from 0 in
        the order given.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    tokens: int
    sequence: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """The same batch with `function` of every tensor."""
        inputs = {name: function(value) for name, value in self.inputs.items()}
        sequence = None if self.sequence is None else function(self.sequence)
        return MicroBatch(inputs, function(self.targets), self.tokens, sequence)

    def to(self, device: torch.device) -> "MicroBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(data: Sequences, chosen: np.ndarray, packing: bool, pad_id: int) -> MicroBatch:
    """Put the chosen sequences end to end in one row (packing) or below each other, padded on the right."""
    return collate_sequences([_Answer(data.tokens(i), data.answer_start(i)) for i in chosen], packing, pad_id)


class _Answer:
    """A `Labelled`: every token from `start` on is learnt."""

    def __init__(self, ids: np.ndarray, start: int) -> None:
        self.ids, self.learnt = ids, np.arange(len(ids)) >= start


def collate_sequences(sequences: Sequence[Labelled], packing: bool, pad_id: int) -> MicroBatch:
    """The same of sequences with masks."""
    rows = [torch.from_numpy(np.asarray(one.ids, dtype=np.int64)) for one in sequences]
    # The token at p is predicted at p - 1: labels are laid out by position, never by token id.
    labels = [torch.full_like(row, -100) for row in rows]
    for row, label, one in zip(rows, labels, sequences, strict=True):
        label[:-1] = torch.where(torch.from_numpy(np.array(one.learnt[1:])), row[1:], -100)
    owners = [torch.full_like(row, number) for number, row in enumerate(rows)]
    tokens = sum(map(len, rows))
    if packing:
        ids, label, owner = torch.cat(rows)[None], torch.cat(labels)[None], torch.cat(owners)[None]
        # Positions that start again at 0 tell the attention where a sequence ends.
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None]}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, label, owner = pad(rows, True, pad_id), pad(labels, True, -100), pad(owners, True, 0)
        mask = pad([torch.ones_like(row) for row in rows], True, 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
    keep = (label != -100).any(0).nonzero().flatten()
    inputs["logits_to_keep"] = keep
    return MicroBatch(inputs, label[:, keep], tokens, owner[:, keep])
