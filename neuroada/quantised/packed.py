"""A quantised weight as one uint8 tensor [out, bytes of a row]: an ordinary parameter, sharded by rows as any other.

A row holds its codes, its fp32 scales and its exact entries, which are the largest of the original row (and, once an
adapter was merged into them, those that it trained): their column numbers (two bytes each, ascending) and their values
in bf16. All of it in one tensor of bytes: no engine casts it, a shard decodes itself, and what autograd saves for
backward is the parameter and nothing beside it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from neuroada.errors import UserError
from neuroada.ops import pack_indices, unpack_indices, write_entries
from neuroada.ops.selection import select_top_k
from neuroada.quantised.codecs import BLOCK, CODECS, Codec

FORMATS = tuple(CODECS)
METHOD = "neuroada"
"""The quant_method of a config.json whose folder stores packed layers."""

CPU_CHUNK, DEVICE_CHUNK = 1 << 20, 1 << 24
"""Elements encoded or decoded at once: their fp32 copies are all that is alive beside the result."""


@dataclass(frozen=True)
class Quantisation:
    """How a model's Linear layers are stored. exact: the entries of each row that keep their bf16 value.

    merged: an adapter's values are among them, so that they are not the largest of their row. The layout is the same.
    """

    format: str
    exact: int = 0
    merged: bool = field(default=False, compare=False)

    @property
    def codec(self) -> Codec:
        return CODECS[self.format]

    def describe(self) -> str:
        return f"{self.format}, {self.exact} exact entries a row" if self.exact else self.format

    def as_json(self) -> dict[str, Any]:
        """What files carry."""
        told = {"quant_method": METHOD, "format": self.format, "block": self.codec.divisor, "exact": self.exact}
        return told | {"merged": True} if self.merged else told

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Quantisation":
        """UserError, beginning with `where`: not what `as_json` makes."""
        found = value if isinstance(value, dict) else {}
        name, exact = found.get("format"), found.get("exact")
        if name not in CODECS or type(exact) is not int or exact < 0:
            raise UserError(f"{where}: {str(value)[:100]} is no known quantisation; quantise the base again")
        if found.get("block") != CODECS[name].divisor:
            raise UserError(f"{where}: block = {found.get('block')}: {name} has {CODECS[name].divisor} here")
        if type(merged := found.get("merged", False)) is not bool:
            raise UserError(f"{where}: merged = {str(merged)[:100]} is not true or false; merge the adapter again")
        return cls(name, exact, merged)


@dataclass(frozen=True)
class PackedRows:
    """The layout of one matrix' rows, [out, inputs]."""

    quantisation: Quantisation
    inputs: int
    name: str = "weight"

    def __post_init__(self) -> None:
        told = f"base.model_dtype = {self.quantisation.format}: {self.name} has {self.inputs} inputs"
        if self.inputs % self.quantisation.codec.divisor:
            raise UserError(f"{told}, not a multiple of the block of {BLOCK}; use int8 or fp8")
        if self.quantisation.exact > self.inputs:
            raise UserError(f"{told}, fewer than base.exact = {self.quantisation.exact}; lower it")

    @cached_property
    def _stops(self) -> tuple[int, int, int, int]:
        """Where codes, scales, exact columns and exact values end."""
        codes, scales = self.quantisation.codec.sizes(self.inputs)
        exact = 2 * self.quantisation.exact
        return codes, codes + 4 * scales, codes + 4 * scales + exact, codes + 4 * scales + 2 * exact

    @property
    def row_bytes(self) -> int:
        return self._stops[-1]

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] floating point -> [rows, row_bytes] uint8. UserError: values that are not finite."""
        packed = torch.empty(len(weight), self.row_bytes, dtype=torch.uint8, device=weight.device)
        for here in self._chunks(weight):
            part = weight[here]
            codes, scales = self.quantisation.codec.encode(part)
            if not torch.isfinite(scales).all():
                raise UserError(f"{self.name} holds values that are not finite: the base checkpoint is damaged")
            columns = select_top_k(part, self.quantisation.exact, "magnitude") if self.quantisation.exact else None
            fields = [codes, scales.view(torch.uint8)]
            if columns is not None:
                values = part.gather(1, columns).to(torch.bfloat16)
                fields += [pack_indices(columns), values.view(torch.uint8)]
            torch.cat(fields, 1, out=packed[here])
        return packed

    def decode(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[rows, row_bytes] uint8 -> [rows, inputs] in `dtype`, in memory of its own."""
        weight = torch.empty(len(packed), self.inputs, dtype=dtype, device=packed.device)
        codes, scales, *_ = self._stops
        for here in self._chunks(weight):
            part = packed[here]
            steps = part[:, codes:scales].contiguous().view(torch.float32)
            weight[here] = self.quantisation.codec.decode(part[:, :codes], steps)
        if self.quantisation.exact:
            columns, values = self.exact_entries(packed)
            write_entries(weight, columns, values.to(dtype))
        return weight

    def exact_entries(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns [rows, exact] int64 and values [rows, exact] bf16."""
        _, start, middle, end = self._stops
        return unpack_indices(packed[:, start:middle]), packed[:, middle:end].contiguous().view(torch.bfloat16)

    def with_entries(self, packed: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The codes and scales of [rows, row_bytes] uint8 with other exact entries, in the layout of as many.

        columns [rows, n] int64, ascending; values [rows, n] bf16.
        """
        codes_and_scales = packed[:, : self._stops[1]]
        return torch.cat([codes_and_scales, pack_indices(columns), values.contiguous().view(torch.uint8)], 1)

    def ranking(self, packed: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] bf16: the exact entries, 0 elsewhere; a row's `exact` largest are the original's.

        Not of a base with an adapter merged into it.
        """
        columns, values = self.exact_entries(packed)
        scores = torch.zeros(len(packed), self.inputs, dtype=torch.bfloat16, device=packed.device)
        write_entries(scores, columns, values)
        return scores

    def _chunks(self, weight: torch.Tensor) -> list[slice]:
        size = CPU_CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
        rows = max(1, size // self.inputs)
        return [slice(first, first + rows) for first in range(0, len(weight), rows)]
