"""An ordinary Hugging Face model's weights, changed in place: whole, or this process's tensor-parallel shards."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from neuroada.ops import unpack_indices
from neuroada.sync.message import Message, Module, SyncError, WrongBase
from neuroada.sync.placement import Entries, Shard, block, locate, read, write


@dataclass
class _Part:
    """One module's entries of one part of the adapter, [rows, k] of which n lie here, and the base values [n]."""

    shape: torch.Size
    param: torch.Tensor
    entries: Entries
    base: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """As it stands here now: `model.to` gives a parameter another tensor."""
        return _stored(self.param)

    def write(self, values: torch.Tensor) -> None:
        write(self.weight, self.entries.flat, values)


class ModelWeights:
    """Kept beside the model: 8 bytes of position a connection, and the base value under it.

    Args:
        model: a model whose modules are named as the trainer's base model's, in the trainer's dtype. Of one that was
            loaded with `tp_plan="auto"`, whose weights are DTensors, each rank makes a receiver for its own parts.
        shards: of another tensor-parallel model, whose weights are ordinary tensors: this process's part, by the end of
            a module's name ("q_proj", "layers.0.mlp.down_proj"). Modules that no entry names are whole.
    """

    def __init__(self, model: nn.Module, shards: Mapping[str, Shard] | None = None) -> None:
        self.model = model
        self.shards = dict(shards or {})
        self._parts: dict[tuple[int, str], _Part] = {}

    def load(self, parts: list[Message]) -> None:
        check_rows(parts)
        self._check_parameters()
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
        self._check_parameters()
        values_here: list[tuple[_Part, torch.Tensor]] = []
        for (number, name), part in self._parts.items():
            values = parts[number].values.get(name)
            if values is None or values.shape != part.shape or values.dtype != part.weight.dtype:
                raise SyncError(f"{name}: the message's values do not fit the state that is there: ask for the state")
            values_here.append((part, values))
        for part, values in values_here:
            part.write(part.entries.choose(values))

    def restore(self) -> None:
        self._check_parameters()
        self._write_base()
        self._parts = {}

    def _check_parameters(self) -> None:
        """That the parameters are still those whose entries were found: another tensor would be changed unseen."""
        for (_, name), part in self._parts.items():
            weight = part.weight
            if self._parameter(name) is not part.param or weight.device != part.base.device or not _flat(weight):
                raise WrongBase(f"{name}.weight was replaced or moved since its state came: make a new receiver")

    def _write_base(self) -> None:
        for part in self._parts.values():
            part.write(part.base)

    def _place(self, name: str, module: Module, idx_bytes: torch.Tensor, base: torch.Tensor) -> _Part:
        """Find a module's entries in this model, and hold its base values against the trainer's."""
        rows, columns = self._bounds(name, module.shape)
        param = self._parameter(name)
        weight = _stored(param)
        if weight.dtype != base.dtype:
            raise WrongBase(f"{name}.weight is {weight.dtype} here, {base.dtype} at the trainer: load it in that dtype")
        if not _flat(weight):
            raise WrongBase(f"{name}.weight is offloaded or not contiguous here: it cannot be changed in place")
        idx = unpack_indices(idx_bytes)
        check_columns(name, idx, module.shape[1])
        entries = locate(idx.to(weight.device), module.first, rows, columns)
        own = read(weight, entries.flat)
        expected = entries.choose(base.to(weight.device))
        if not own.view(torch.uint8).equal(expected.contiguous().view(torch.uint8)):
            raise WrongBase(f"{name}.weight: other base weights than the trainer's; load the base model it trains")
        return _Part(base.shape, param, entries, own)

    def _bounds(self, name: str, shape: tuple[int, int]) -> tuple[slice, slice]:
        """Which rows and columns of a weight of `shape` [out, in] stand here."""
        param, shard = self._parameter(name), self._shard(name)
        if isinstance(param, DTensor):
            sizes, starts = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
            rows, columns = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        else:
            rows, columns = block(name, shape, shard)
            if shard is not None:
                shape = (rows.stop - rows.start, columns.stop - columns.start)
        if tuple(param.shape) != shape:
            here = tuple(param.shape)
            raise WrongBase(f"{name}.weight is {here} here instead of {shape}; give `shards` if it is a shard of it")
        return rows, columns

    def _parameter(self, name: str) -> torch.Tensor:
        try:
            return self.model.get_submodule(name).weight  # type: ignore[return-value]
        except AttributeError:
            raise WrongBase(f"{name}: this model has no such Linear; load the base model that is trained") from None

    def _shard(self, name: str) -> Shard | None:
        return next((shard for end, shard in self.shards.items() if f".{name}".endswith(f".{end}")), None)


def _stored(param: torch.Tensor) -> torch.Tensor:
    return param.to_local().detach() if isinstance(param, DTensor) else param.data


def _flat(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() and not weight.is_meta


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
