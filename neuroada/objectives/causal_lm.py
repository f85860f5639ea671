"""Causal language modelling: the answer's tokens after the prompt's."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neuroada.objectives.base import Objective
from neuroada.objectives.cross_entropy import answer_loss
from neuroada.objectives.micro_batch import MicroBatch, collate
from neuroada.tasks.data import fingerprint, load_examples
from neuroada.tasks.encode import Encoded, encode
from neuroada.tasks.hold_out import hold_out


class CausalLM(Objective):
    name = "causal_lm"
    task_type = "CAUSAL_LM"
    loss_unit = "nats per answer token"
    pipeline_tag = "text-generation"
    auto_name = "AutoModelForCausalLM"

    data: Encoded

    def load_data(self, tokenizer: Any) -> Encoded:
        recipe = self.recipe
        examples, *_ = hold_out(load_examples(self.task, "train", recipe.data_dir), recipe.train.held_out)
        cache = Path(recipe.data_dir) / ".tokens"
        self.tokenizer, self.data_fingerprint = tokenizer, fingerprint(examples)
        self.data = encode(examples, self.task, tokenizer, recipe.train.max_length, cache_dir=cache)
        return self.data

    def collate(self, chosen: np.ndarray) -> MicroBatch:
        return collate(self.data, chosen, self.recipe.train.packed, self.tokenizer.pad_token_id)

    def summed_loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return answer_loss(model, batch)

    def normaliser(self, batch: np.ndarray) -> int:
        return int(self.data.num_answer_tokens[batch].sum())

    def longest_batch(self, vocab_size: int) -> MicroBatch:
        """Every sequence of train.max_length tokens, a loss on every one but the first.

        Packed sequences are rows of their own here: without padding and mask that costs what flash-attn's
        variable-length kernels cost on one row (`packed_sdpa` divides its row by the values of position_ids, which a
        fake tensor has not).
        """
        train = self.recipe.train
        data = _Longest(train.micro_batch_size, train.max_length, vocab_size)
        batch = collate(data, np.arange(train.micro_batch_size), packing=False, pad_id=0)
        if train.packed:
            del batch.inputs["attention_mask"]
        return batch

    def compared_losses(
        self, entry: Mapping[str, Any], load: Callable[[], tuple[nn.Module, Any]]
    ) -> dict[str, float | None]:
        """Of the loaded model, on what train.held_out leaves out."""
        recipe, (model, tokenizer) = self.recipe, load()
        _, *parts = hold_out(load_examples(self.task, "train", recipe.data_dir), recipe.train.held_out)
        found: dict[str, float | None] = {}
        for name, part in zip(("validation", "test"), parts, strict=True):
            data = encode(part, self.task, tokenizer, recipe.train.max_length)
            found[name] = mean_answer_loss(model, data, tokenizer.pad_token_id or 0)
        return found


class _Longest:
    """`Sequences` of one length."""

    def __init__(self, size: int, length: int, vocab_size: int) -> None:
        self.lengths = np.full(size, length)
        self.num_answer_tokens = self.lengths - 1
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        return np.arange(self.lengths[index]) % self.vocab_size

    def answer_start(self, index: int) -> int:
        return 1


def mean_answer_loss(model: nn.Module, data: Encoded, pad_id: int, rows: int = 8) -> float:
    """Cross-entropy per answer token, in nats, over all of `data`."""
    order, tokens, total = np.argsort(data.lengths, kind="stable"), int(data.num_answer_tokens.sum()), 0.0
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(order), rows):
            batch = collate(data, order[start : start + rows], packing=False, pad_id=pad_id).to(device)
            total += answer_loss(model, batch).item() / tokens
    return total
