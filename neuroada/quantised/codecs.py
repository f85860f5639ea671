"""Number formats of a quantised weight: rows of floating point to rows of bytes with scales, and back.

Every row is encoded by itself, so that a shard of rows is encoded and decoded by the rank that stores it. Values are
decoded in fp32 and rounded once to the dtype asked for. The bits are those of the libraries that made the formats
known: bitsandbytes' NF4 (block size 64, no nested scales), torchao's Int8WeightOnly and Float8WeightOnly, by row.
"""

from typing import Protocol

import torch

BLOCK = 64
"""Inputs that share an NF4 scale; a block never reaches into the next row."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4 (Dettmers et al., QLoRA, 2023): quantiles of a normal distribution, scaled to [-1, 1]."""


class Codec(Protocol):
    """divisor: what a row's number of inputs must be a multiple of."""

    name: str
    divisor: int

    def sizes(self, inputs: int) -> tuple[int, int]:
        """(bytes of codes, number of fp32 scales) of a row."""

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, in] floating point -> codes [rows, bytes] uint8, scales [rows, n] fp32."""

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Back to [rows, in] fp32."""


class NF4:
    """Four bits a weight, the first of two in a byte's upper half; an fp32 scale for each 64."""

    name, divisor = "nf4", BLOCK

    def sizes(self, inputs: int) -> tuple[int, int]:
        return inputs // 2, inputs // BLOCK

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = weight.float().unflatten(1, (-1, BLOCK))
        scales = blocks.abs().amax(2)
        scaled = (blocks * (1.0 / scales.clamp(min=1e-38))[..., None]).clamp_(-1, 1)
        levels, _ = _tables(weight.device)
        level = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).flatten(1).to(torch.uint8)
        return (level[:, ::2] << 4) | level[:, 1::2], scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        _, pairs = _tables(codes.device)
        blocks = pairs[codes.int()].view(len(codes), -1, BLOCK)
        return blocks.mul_(scales[..., None]).flatten(1)


_LEVELS = torch.tensor(NF4_LEVELS, device="cpu")
_BYTES = torch.arange(256, device="cpu")
_TABLES = {torch.device("cpu"): (_LEVELS, torch.stack([_LEVELS[_BYTES >> 4], _LEVELS[_BYTES & 15]], 1))}


def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels [16], and the two values of each byte [256, 2]."""
    if device not in _TABLES:
        levels, pairs = (table.to(device) for table in _TABLES[torch.device("cpu")])
        if type(levels) is not torch.Tensor:  # a fake one, which must not outlive its mode
            return levels, pairs
        _TABLES[device] = levels, pairs
    return _TABLES[device]


class Int8:
    """Eight bits a weight, symmetric around 0; an fp32 scale for each row."""

    name, divisor = "int8", 1

    def sizes(self, inputs: int) -> tuple[int, int]:
        return inputs, 1

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The scale is rounded to the weight's dtype, as torchao's is.
        scales = (weight.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
        codes = (weight * (1.0 / scales)).round_().clamp_(-128, 127).to(torch.int8)
        return codes.view(torch.uint8), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return codes.contiguous().view(torch.int8).float().mul_(scales)


class Fp8:
    """e4m3, eight bits a weight; an fp32 scale for each row. Storage only: products are made in the compute dtype."""

    name, divisor = "fp8", 1

    def sizes(self, inputs: int) -> tuple[int, int]:
        return inputs, 1

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        highest = torch.finfo(torch.float8_e4m3fn).max
        scales = (weight.abs().amax(1, keepdim=True) / highest).float()
        codes = (weight.float() / scales.clamp(min=1e-38)).clamp_(-highest, highest).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).float().mul_(scales)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (NF4(), Int8(), Fp8())}
