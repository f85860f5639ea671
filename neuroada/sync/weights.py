"""An ordinary Hugging Face model's weights, changed in place: whole, or this process's tensor-parallel shards."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from neuroada.ops import unpack_indices
from neuroada.sync.message import Message, Module, SyncError, WrongBase
from neuroada.sync.placement import Entries, Shard, block, locate, read, write


@dataclass
class _Part:
    """One module's entries of one part of the adapter, [rows, k] of which n lie here, and the base values [n]."""

    shape: torch.Size
    weight: torch.Tensor
    entries: Entries
    base: torch.Tensor

    def write(self, values: torch.Tensor) -> None:
        write(self.weight, self.entries.flat, values)


class ModelWeights:
    """Kept beside the model: 8 bytes of position a connection, and the base value under it.

    Args:
        model: a model whose modules are named as the trainer's base model's; its weights are ordinary tensors of the
            trainer's dtype.
        shards: of a tensor-parallel model, by the end of a module's name ("q_proj", "layers.0.mlp.down_proj"): this
            process's part of those weights. Modules that no entry names are whole.
    """

    def __init__(self, model: nn.Module, shards: Mapping[str, Shard] | None = None) -> None:
        self.model = model
        self.shards = dict(shards or {})
        self._parts: dict[tuple[int, str], _Part] = {}

    def load(self, parts: list[Message]) -> None:
        check_rows(parts)
        before = {key: read(part.weight, part.entries.flat) for key, part in self._parts.items()}
        self._write_base()
        try:
            found = {
                (number, name): self._place(name, module, part.idx[name], part.base[name])
                for number, part in enumerate(parts)
                for name, module in (part.header.modules or {}).items()
            }
        except BaseException:
            for key, values in before.items():
                self._parts[key].write(values)
            raise
        self._parts = found
        self.write(parts)

    def write(self, parts: list[Message]) -> None:
        values_here: list[tuple[_Part, torch.Tensor]] = []
        for (number, name), part in self._parts.items():
            values = parts[number].values.get(name)
            if values is None or values.shape != part.shape or values.dtype != part.weight.dtype:
                raise SyncError(f"{name}: the message's values do not fit the state that is there: ask for the state")
            values_here.append((part, values))
        for part, values in values_here:
            part.write(part.entries.choose(values))

    def restore(self) -> None:
        self._write_base()
        self._parts = {}

    def _write_base(self) -> None:
        for part in self._parts.values():
            part.write(part.base)

    def _place(self, name: str, module: Module, idx_bytes: torch.Tensor, base: torch.Tensor) -> _Part:
        """Find a module's entries in this model, and hold its base values against the trainer's."""
        weight = self._weight(name)
        shard = self._shard(name)
        rows, columns = block(name, module.shape, shard)
        here = (rows.stop - rows.start, columns.stop - columns.start)
        if tuple(weight.shape) != here:
            raise WrongBase(
                f"{name}.weight is {tuple(weight.shape)} here, the trainer's is {module.shape}"
                + (f" and this shard of it {here}" if shard else "; give `shards` for a tensor-parallel model")
            )
        if weight.dtype != base.dtype:
            raise WrongBase(f"{name}.weight is {weight.dtype} here, {base.dtype} at the trainer: load it in that dtype")
        if not weight.is_contiguous():
            raise WrongBase(f"{name}.weight is not contiguous here: it cannot be changed in place")
        idx = unpack_indices(idx_bytes)
        check_columns(name, idx, module.shape[1])
        entries = locate(idx.to(weight.device), module.first, rows, columns)
        own = read(weight, entries.flat)
        expected = entries.choose(base.to(weight.device))
        if not own.view(torch.uint8).equal(expected.contiguous().view(torch.uint8)):
            raise WrongBase(f"{name}.weight: other base weights than the trainer's; load the base model it trains")
        return _Part(base.shape, weight, entries, own)

    def _weight(self, name: str) -> torch.Tensor:
        try:
            return self.model.get_submodule(name).weight.data  # type: ignore[return-value]
        except AttributeError:
            raise WrongBase(f"{name}: this model has no such Linear; load the base model that is trained") from None

    def _shard(self, name: str) -> Shard | None:
        return next((shard for end, shard in self.shards.items() if f".{name}".endswith(f".{end}")), None)


def check_rows(parts: list[Message]) -> None:
    """That the parts of a state hold every row of every module exactly once."""
    held: dict[str, list[Module]] = {}
    for part in parts:
        for name, module in (part.header.modules or {}).items():
            held.setdefault(name, []).append(module)
    for name, modules in held.items():
        modules.sort(key=lambda module: (module.first, module.last))
        ends = [0, *(module.last for module in modules)]
        same = len({(module.shape, module.k) for module in modules}) == 1
        if not same or ends[:-1] != [module.first for module in modules] or ends[-1] != modules[0].shape[0]:
            raise SyncError(f"{name}: the parts of this state do not hold each of its rows once: ask for it again")


def check_columns(name: str, idx: torch.Tensor, columns: int) -> None:
    """That the indices [rows, k] name different columns of each row."""
    if not idx.numel():
        return
    ordered = idx.sort(dim=1).values
    if int(ordered[:, -1].max()) >= columns or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise SyncError(f"{name}: its indices repeat, or leave the {columns} columns: ask for the state again")
