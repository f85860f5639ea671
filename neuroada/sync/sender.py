"""The trainer's side: this rank's own rows of an adapter, as messages."""

import hashlib
import secrets

import torch
import torch.distributed as dist
from torch import nn

from neuroada import sharding
from neuroada.adapter import NeuroAdaLinear
from neuroada.errors import UserError
from neuroada.ops import TRANSPOSED, adapted
from neuroada.sync.message import Header, Kind, Message, Module, encode


class Sender:
    """Turns the adapter of a model under any engine into messages, a part of each on every rank.

    Every rank makes one and calls it at the same points. No weight is gathered: a rank sends the rows it owns, and
    where all ranks hold all rows (ZeRO-1, ZeRO-2) each sends its share. Kept between messages: the base values under
    this rank's rows, 2 bytes a connection in bf16.

    Args:
        model: a PEFT model with NeuroAda layers, or the DeepSpeed engine or FSDP2 module around one.
        adapter: whose values are sent first; `use` changes it.
        group: the trainer's ranks; all by default. Collective: the ranks agree on a name for the stream.
    """

    def __init__(self, model: nn.Module, adapter: str = "default", group: dist.ProcessGroup | None = None) -> None:
        several = dist.is_initialized()
        self.group = group
        self.part = dist.get_rank(group) if several else 0
        self.parts = dist.get_world_size(group) if several else 1
        self._refuse_other_parameters(model)
        self._all_layers = [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
        self.version = -1
        """Of the message sent last; -1 before the first."""
        self.use(adapter)
        self.stream = self._agree_on_stream()

    def use(self, adapter: str) -> None:
        """Send this adapter from now on, beginning with a state message: receivers swap to it by that one message."""
        layers = [layer for layer in self._all_layers if adapter in layer.neuroada_idx]
        if not layers:
            known = sorted({name for layer in self._all_layers for name in layer.neuroada_idx})
            raise UserError(f"adapter = {adapter!r}: the model has no such NeuroAda adapter, but {known or 'none'}")
        if waiting := [layer.name for layer in layers if adapter in layer.unselected]:
            raise UserError(f"adapter = {adapter!r}: {waiting[0]} has no connections yet; select or load them first")
        if quantised := [layer.quantisation for layer in layers if layer.quantisation]:
            # Exact entries are the original's: a receiver that holds the original would not be told from the right one.
            raise UserError(
                f"adapter = {adapter!r}: its base is quantised ({quantised[0].describe()}), which sync does not send; "
                f"merge the adapter and load the whole model"
            )
        if other := [layer.name for layer in layers if layer.base.format is TRANSPOSED or len(layer.base.neurons) > 1]:
            raise UserError(
                f"adapter = {adapter!r}: {other[0]} is not a Linear's weight [out, in], which sync sends alone (no "
                f"experts, no Conv1D); merge the adapter and load the whole model"
            )
        self.adapter, self._layers = adapter, layers
        self._layout: str | None = None
        self._base: dict[str, torch.Tensor] = {}

    def message(self, state: bool = False) -> bytearray:
        """This rank's part of the next version: values alone, or everything.

        A state message is made at first, after `use`, and when `state` asks for it, which must be on all ranks alike;
        every receiver can take either. Collective where ZeRO-3's cut goes through rows, and for state messages.
        """
        self.version += 1
        if state or self._layout is None:
            return self._state()
        return encode(Message(self._header("values"), self._values(), {}, {}))

    def agree(self, asked: bool) -> bool:
        """Whether any rank was asked for a state message. Collective."""
        if self.parts == 1:
            return asked
        flag = torch.tensor([int(asked)], device=self._device())
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def _refuse_other_parameters(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            if param.requires_grad and "neuroada_delta" not in name:
                raise UserError(f"{name} is trained too: sync sends NeuroAda connections alone; freeze it")

    def _state(self) -> bytearray:
        modules, idx = {}, {}
        digest = hashlib.sha256()
        for layer in self._layers:
            idx_param = _param(layer.neuroada_idx, self.adapter)
            base = layer.base_values(self.adapter)
            with sharding.own_rows(idx_param) as (rows, own):
                mine = self._share(idx_param, rows)
                idx[layer.name] = own[mine.start - rows.start : mine.stop - rows.start].detach().cpu().clone()
            self._base[layer.name] = base[mine].clone()
            shape = (layer.out_features, layer.in_features)
            modules[layer.name] = Module(shape, idx[layer.name].shape[1] // 2, mine.start, mine.stop)
            digest.update(f"{layer.name} {modules[layer.name]}".encode())
            for tensor in (idx[layer.name], self._base[layer.name]):
                digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self._check_shares(modules)
        self._layout = digest.hexdigest()
        return encode(Message(self._header("state", modules), self._values(), idx, self._base))

    def _values(self) -> dict[str, torch.Tensor]:
        """What forward computes with, of this rank's rows: base + delta, rounded once."""
        values = {}
        for layer in self._layers:
            delta = _param(layer.neuroada_delta, self.adapter)
            with sharding.own_rows(delta) as (rows, own):
                mine = self._share(delta, rows)
                values[layer.name] = adapted(
                    self._base[layer.name], own[mine.start - rows.start : mine.stop - rows.start]
                )
        return values

    def _share(self, param: torch.Tensor, rows: slice) -> slice:
        """The rows this rank sends, of those that `own_rows` gives it: its own, or its share of what all ranks hold."""
        shared = sharding.is_whole(param) or sharding.layout(param).rows(param) is None
        if not shared:
            return rows
        count = rows.stop
        return slice(self.part * count // self.parts, (self.part + 1) * count // self.parts)

    def _check_shares(self, modules: dict[str, Module]) -> None:
        """That the ranks' rows are all rows, once: replicas of shards (hybrid sharding) would send them twice."""
        if not dist.is_initialized() or self.parts == 1:
            return
        rows = torch.tensor([sum(module.last - module.first for module in modules.values())], device=self._device())
        dist.all_reduce(rows, group=self.group)
        expected = sum(module.shape[0] for module in modules.values())
        if rows.item() != expected:
            raise UserError(
                f"group: its {self.parts} ranks own {rows.item()} rows of {expected}; give the ranks of one replica, "
                f"and make the sender on those alone"
            )

    def _header(self, kind: Kind, modules: dict[str, Module] | None = None) -> Header:
        assert self._layout is not None
        return Header(kind, self.stream, self.version, self.adapter, self.part, self.parts, self._layout, modules)

    def _device(self) -> torch.device:
        return sharding.stored(_param(self._layers[0].neuroada_idx, self.adapter)).device

    def _agree_on_stream(self) -> str:
        name = torch.tensor(list(secrets.token_bytes(8)), dtype=torch.uint8, device=self._device())
        if self.parts > 1:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            dist.broadcast(name, source, group=self.group)
        return bytes(name.tolist()).hex()


def _param(holder: nn.ParameterDict, adapter: str) -> nn.Parameter:
    return holder[adapter]
