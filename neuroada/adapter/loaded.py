"""What PEFT or transformers loads into an adapter: whole and as it was saved, or refused and taken off the model.

PEFT loads what it finds (see `adapter_file`), so its two ways in are watched: `NeuroAdaModel` hands over the tensors
that are about to be copied into the model, `transformers_loading` what transformers has loaded by itself. Sharded
parameters are not looked at: a rank sees a part of them, and might load them alone.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from neuroada import sharding
from neuroada.adapter.adapter_file import AGAIN, PREFIX, check_finite_values, check_pair, sha256_of
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.experts import NeuroAdaExperts, NeuroAdaExpertsWeight
from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.layer import NeuroAdaLinear, neuroada_layers
from neuroada.errors import UserError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""A delta's dtypes in a file: fp32, unless the whole model was cast before it was saved."""


def check_tensors(model: nn.Module, config: NeuroAdaConfig, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """`tensors`, by the names of the model's parameters, are all that the adapter needs and what was saved.

    A new adapter that is refused leaves the model; one that was there before stays, as it is. UserError: a module
    without indices or deltas; a tensor that belongs nowhere; shapes, dtypes and repeated indices as of `read_adapter`;
    values that are not finite; tensors that differ from the configuration's connections_sha256, which is compared when
    a new adapter gets its connections: later its values may come from elsewhere, a trainer's checkpoint, say.
    """
    layers = [layer for layer in neuroada_layers(model) if adapter in layer.neuroada_idx]
    params = [param for layer in layers for param in layer.params(adapter)]
    new = all(adapter in layer.unselected for layer in layers)
    if not all(sharding.is_whole(param) for param in params) or not (tensors or new):
        return
    try:
        _check_connections(model, layers, adapter, tensors)
        for name, value in tensors.items():
            if _is_here(value):
                check_finite_values(_told(adapter), name, value)
        if new and config.connections_sha256 is not None:
            # or what this very configuration's adapter holds now, which is being copied
            check_sha256(_told(adapter), {config.connections_sha256, config.saved_sha256}, adapter, tensors)
    except UserError:
        if new:
            discard(model, cast(Any, model).peft_config, adapter)
        raise


def check_fingerprint(layers: list[NeuroAdaLinear], adapter: str, config: NeuroAdaConfig) -> None:
    """Refuse an adapter that was trained on other base weights. Collective if sharded."""
    if not layers or not all(layer.is_known(adapter) for layer in layers):
        return
    found, expected = fingerprint(layers, adapter), config.base_fingerprint
    if expected not in (None, found):
        raise UserError(
            f"adapter {adapter!r} was trained on other base weights (base_fingerprint {expected}, here {found}): load "
            f"it over the base model it names, or set base_fingerprint to null in its adapter_config.json"
        )
    note_fingerprint(layers, adapter, found)


def note_fingerprint(layers: list[NeuroAdaLinear], adapter: str, found: str) -> None:
    for layer in layers:
        layer.trained_on[adapter] = found


def discard(model: nn.Module, configs: dict[str, Any], adapter: str) -> None:
    """Leave nothing of an adapter whose attaching or loading was refused. `configs`: the model's peft_config."""
    configs.pop(adapter, None)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NeuroAdaExperts):
            if layer.discard(adapter):
                _replace(model, name, layer.base_layer)
        elif isinstance(layer, NeuroAdaLinear) and not isinstance(layer, NeuroAdaExpertsWeight):
            if adapter in layer.neuroada_idx:
                layer.delete_adapter(adapter)
            if not layer.neuroada_idx:
                _replace(model, name, layer.base_layer)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            module.delete_adapter(adapter, new_active_adapters=None)
        if not configs and module.__dict__.get("peft_config") is configs and not isinstance(module, BaseTuner):
            del module.peft_config  # PEFT hangs it on the base, and takes it for an adapted one by that
            module.__dict__.pop("_hf_peft_config_loaded", None)  # transformers' own flag of the same


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_connections(
    model: nn.Module, layers: list[NeuroAdaLinear], adapter: str, tensors: Mapping[str, torch.Tensor]
) -> None:
    names: dict[int, list[str]] = defaultdict(list)  # of a parameter, by its identity: shared modules have several
    for name, param in model.named_parameters(remove_duplicate=False):
        names[id(param)].append(name.removeprefix(PREFIX))
    given = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    lacking = []
    for layer in layers:
        idx, delta = (
            next((given[name] for name in names[id(param)] if name in given), None) for param in layer.params(adapter)
        )
        if idx is None and delta is None:
            lacking.append(layer.name)
        elif idx is None:
            raise UserError(f"{_told(adapter)}: {layer.name} has deltas and no indices; {AGAIN}")
        elif delta is None or (_is_here(idx) and _is_here(delta)):
            k = sharding.shape(layer.params(adapter)[1])[-1]
            if delta is not None and delta.is_floating_point():
                delta = delta.float()  # whatever the model was cast to before it was saved
            check_pair(_told(adapter), layer.name, idx, delta, k)
            layer.check_fits(adapter, idx)
    known = {name for every in names.values() for name in every}
    strange = [name for name in given if ".neuroada_" in name and name not in known]
    if strange:
        raise UserError(f"{_told(adapter)}: holds {strange[0]}, which the model has no place for; {AGAIN}")
    if lacking:
        raise UserError(
            f"{_told(adapter)}: lacks the connections of {len(lacking)} of {len(layers)} modules, {lacking[0]} among "
            f"them; {AGAIN}, or load it over the base model that it was trained on"
        )


def check_sha256(told: str, expected: set[str | None], adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """UserError where `tensors`, under PEFT's names, are not those that one of the checksums was made of."""
    for dtype in DTYPES:  # transformers has made fp32 of all of them: exactly, so that the way back is exact
        cast_back = {name: value.to(dtype) if ".neuroada_delta" in name else value for name, value in tensors.items()}
        found = sha256_of(cast_back, adapter)
        if found is None or found in expected:
            return
    raise UserError(
        f"{told}: indices or deltas are not those that were saved (connections_sha256 differs); {AGAIN}, or "
        f"set connections_sha256 to null in its configuration"
    )


def _is_here(value: torch.Tensor) -> bool:
    return type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta


def _told(adapter: str) -> str:
    return f"the file of adapter {adapter!r}"
