"""Indices as they are stored and as they travel: two uint8 bytes of one little-endian uint16 each.

int16 cannot be sent by NCCL or gloo, and int64 would cost four times the delta it belongs to. The bytes are widened
to int64 only inside the op.
"""

import torch

MAX_IN_FEATURES = 65536


def pack_indices(idx: torch.Tensor) -> torch.Tensor:
    """[rows, k] integer column numbers below 65,536 -> [rows, 2k] uint8."""
    # torch has few uint16 kernels: go through int16, whose bits are the same modulo 65,536.
    return idx.to(torch.int16).contiguous().view(torch.uint8)


def unpack_indices(idx_bytes: torch.Tensor) -> torch.Tensor:
    """[rows, 2k] uint8 -> [rows, k] int64."""
    if not idx_bytes.shape[-1]:
        return idx_bytes.long()  # no column at all: nothing to view as another dtype
    return idx_bytes.contiguous().view(torch.int16).long() & 0xFFFF
