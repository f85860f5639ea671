"""Sequences of tokens as the tensors of one forward pass."""

from collections.abc import Callable
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


@dataclass
class MicroBatch:
    """What one forward pass of a rank takes.

    inputs: the model's keyword arguments. Of a causal language model among them `logits_to_keep`, the positions
        (columns) whose next token some row is to be scored on, so that logits exist only there.
    targets: of a causal language model [rows, len(logits_to_keep)] int64, -100 where that position carries no loss; of
        a classifier [rows] fp32, class numbers or values.
    tokens: real tokens, without padding.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    tokens: int

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """The same batch with `function` of every tensor."""
        inputs = {name: function(value) for name, value in self.inputs.items()}
        return MicroBatch(inputs, function(self.targets), self.tokens)

    def to(self, device: torch.device) -> "MicroBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(data: Sequences, chosen: np.ndarray, packing: bool, pad_id: int) -> MicroBatch:
    """Put the chosen sequences end to end in one row (packing) or below each other, padded on the right."""
    rows = [torch.from_numpy(np.asarray(data.tokens(i), dtype=np.int64)) for i in chosen]
    starts = [data.answer_start(i) for i in chosen]
    # The token at p is predicted at p - 1: labels are laid out by position, never by token id.
    labels = [torch.full_like(row, -100) for row in rows]
    for row, label, start in zip(rows, labels, starts, strict=True):
        label[start - 1 : -1] = row[start:]
    tokens = sum(map(len, rows))
    if packing:
        ids, label = torch.cat(rows)[None], torch.cat(labels)[None]
        # Positions that start again at 0 tell the attention where a sequence ends.
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None]}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, label = pad(rows, True, pad_id), pad(labels, True, -100)
        mask = pad([torch.ones_like(row) for row in rows], True, 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
    keep = (label != -100).any(0).nonzero().flatten()
    inputs["logits_to_keep"] = keep
    return MicroBatch(inputs, label[:, keep], tokens)
