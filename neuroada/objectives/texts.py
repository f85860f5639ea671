"""Texts and their labels as tokens, for an encoder."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from neuroada.objectives.micro_batch import MicroBatch
from neuroada.tasks.table import Example, Task

_CHUNK = 4096  # texts given to the tokenizer at once


@dataclass(frozen=True)
class Texts:
    """Texts (or pairs) and their labels, the tokens of all of them one after the other in flat arrays.

    Text i is `features[name][offsets[i] : offsets[i + 1]]`: input_ids, and token_type_ids where the model reads them.
    """

    features: dict[str, np.ndarray]  # [tokens] int32 each
    offsets: np.ndarray  # [n + 1] int64
    labels: np.ndarray  # [n] fp32: a class number, or the value of a regression
    full: int  # texts that fill max_length: longer ones were truncated at their end

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: tokens of each text."""
        return np.diff(self.offsets)

    def __str__(self) -> str:
        truncated = f"; {self.full:,} of max_length, longer texts truncated there" if self.full else ""
        return f"{len(self):,} texts, {self.offsets[-1]:,} tokens{truncated}"

    def collate(self, chosen: np.ndarray, pad_id: int) -> MicroBatch:
        """Inputs of [len(chosen), longest] int64 each, padded on the right, and the labels."""
        inputs = {}
        for name, flat in self.features.items():
            rows = [torch.from_numpy(flat[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)) for i in chosen]
            pad = pad_id if name == "input_ids" else 0
            inputs[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.from_numpy(self.lengths[chosen])
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return MicroBatch(inputs, torch.from_numpy(self.labels[chosen]), int(lengths.sum()))


def encode_texts(examples: list[Example], task: Task, tokenizer: Any, max_length: int) -> Texts:
    """Tokenise the task's text columns to at most `max_length` tokens; of a pair the longer text is truncated first."""
    max_length = min(max_length, tokenizer.model_max_length)
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    pieces: dict[str, list[list[int]]] = {name: [] for name in names}
    for start in range(0, len(examples), _CHUNK):
        columns = [[example[column] for example in examples[start : start + _CHUNK]] for column in task.text_columns]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        for name in names:
            pieces[name] += encoded[name]
    lengths = np.array([len(ids) for ids in pieces["input_ids"]])
    return Texts(
        features={name: np.concatenate(some).astype(np.int32) for name, some in pieces.items()},
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array([float(example[task.answer_column]) for example in examples], dtype=np.float32),
        full=int((lengths == max_length).sum()),
    )
