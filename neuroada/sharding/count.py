"""How much of a parameter a rank keeps, by rule: what the tests count in real ranks, and what plans are made of."""

import math
from collections import Counter
from typing import Literal

import torch
from torch import nn

FP32 = 4
KINDS = ("idx", "delta")


def kept_numel(shape: torch.Size, ranks: int, layout: Literal["zero3", "fsdp2"]) -> int:
    """Elements on the rank that stores most: ZeRO-3 splits the flattened tensor, FSDP2 its rows; both round up."""
    if layout == "zero3":
        return -(-shape.numel() // ranks)
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def kept_bytes(model: nn.Module, ranks: int, layout: Literal["zero3", "fsdp2"]) -> dict[str, int]:
    """Bytes of the fullest rank, by kind: weights, idx, delta, moments, and ZeRO-3's fp32 master copy.

    `model` carries its adapter; it may stand on the meta device.
    """
    kept: Counter[str] = Counter()
    for name, param in model.named_parameters():
        numel = kept_numel(param.shape, ranks, layout)
        kind = next((kind for kind in KINDS if f"neuroada_{kind}." in name), "weights")
        kept[kind] += numel * param.element_size()
        if param.requires_grad:
            kept["moments"] += 2 * (FP32 if layout == "zero3" else param.element_size()) * numel
            if layout == "zero3":
                kept["master"] += FP32 * numel
    return dict(kept)
