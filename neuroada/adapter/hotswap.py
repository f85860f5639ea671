"""Another adapter's values in an adapter's place, without touching the model around it: PEFT's signature."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights

from neuroada import sharding
from neuroada.adapter.adapter_file import PREFIX, check_finite_values, check_pair
from neuroada.adapter.config import NeuroAdaType
from neuroada.adapter.fingerprint import checksum, quantisation_of, with_format
from neuroada.adapter.loaded import check_sha256, note_fingerprint
from neuroada.adapter.model import NeuroAdaModel
from neuroada.errors import UserError
from neuroada.ops import unpack_indices


def hotswap_adapter(
    model: PeftModel, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Copy the adapter at `model_name_or_path` over the loaded one of this name; nothing is changed if it does not fit.

    Both must adapt the same modules with the same k. A compiled model stays compiled. Not while a pass runs: that pass
    would compute some layers with the old values and some with the new.
    """
    path = str(model_name_or_path)
    config: Any = PeftConfig.from_pretrained(path, **kwargs)
    if config.peft_type != NeuroAdaType.NEUROADA:
        raise UserError(f"{path}: is a {config.peft_type.value} adapter; swap in one of NeuroAda's")
    tuner = model.base_model
    layers = tuner.adapted_layers(adapter_name) if isinstance(tuner, NeuroAdaModel) else []
    if not layers:
        raise UserError(f"adapter_name = {adapter_name!r}: the model has no such NeuroAda adapter; load one first")
    if any(layer.merged for layer in layers):
        raise UserError(f"adapter_name = {adapter_name!r}: is merged; call unmerge_adapter first")
    tensors = load_peft_weights(path, device=torch_device or "cpu", **kwargs)
    given = dict(tensors)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in layers:
        idx, delta = (tensors.pop(f"{PREFIX}{layer.name}.neuroada_{kind}", None) for kind in ("idx", "delta"))
        if idx is None or delta is None or idx.shape != layer.neuroada_idx[adapter_name].shape:
            theirs = "none" if idx is None else f"{idx.shape[-1] // 2}"
            raise UserError(
                f"{path}: its connections for {layer.name} are {theirs} of a neuron, those of {adapter_name!r} "
                f"{layer.neuroada_idx[adapter_name].shape[-1] // 2}; load it as an adapter of its own"
            )
        if config.connections_sha256 is None:  # what is as it was saved has not to be sorted
            check_pair(path, layer.name, idx, delta.float() if delta.is_floating_point() else delta, idx.shape[-1] // 2)
        check_finite_values(path, f"{layer.name}.neuroada_delta", delta)
        if int(unpack_indices(idx).max()) >= layer.in_features or not sharding.is_whole(layer.base.stored):
            raise UserError(f"{path}: does not fit {layer.name}, of {layer.in_features} inputs, or that is sharded")
        found[layer.name] = idx, delta
    if tensors:
        raise UserError(f"{path}: holds {min(tensors)}, which {adapter_name!r} lacks; load it as an adapter of its own")
    if config.connections_sha256 is not None:
        check_sha256(path, {config.connections_sha256}, adapter_name, given)
    by_name = sorted(layers, key=lambda layer: layer.name)
    given_idx = ((layer, found[layer.name][0].to(layer.base.stored.device)) for layer in by_name)
    base = ((layer.name, idx, layer.base_values_at(idx)) for layer, idx in given_idx)
    fingerprint = with_format(quantisation_of(layers), checksum(base))
    if config.base_fingerprint not in (None, fingerprint):
        raise UserError(
            f"{path}: was trained on other base weights (base_fingerprint {config.base_fingerprint}, here "
            f"{fingerprint}); swap it in over the base model it names"
        )
    with torch.no_grad():
        for layer in layers:
            layer.neuroada_idx[adapter_name].copy_(found[layer.name][0])
            layer.neuroada_delta[adapter_name].copy_(found[layer.name][1])
            layer.unselected.discard(adapter_name)
    note_fingerprint(layers, adapter_name, fingerprint)
