"""A micro batch's share of the loss."""

import torch
import torch.nn.functional as F
from torch import nn

from neuroada.training.batches import MicroBatch


def answer_loss(model: nn.Module, batch: MicroBatch, answer_tokens: int) -> torch.Tensor:
    """Cross-entropy summed over this micro batch's answer tokens, over the answer tokens of the whole global batch.

    So the parts of all ranks and micro batches add up to the mean over the global batch, however it is divided.
    Logits exist only at the positions that carry a loss, and are compared in fp32.
    """
    logits = model(**batch.inputs, use_cache=False).logits
    total = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100, reduction="sum")
    return total / answer_tokens
