"""Adapters combined into one: exact sums over the union of their connections."""

from typing import TYPE_CHECKING, Any

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import nn

from neuroada import sharding
from neuroada.errors import UserError
from neuroada.ops import pack_indices, unpack_indices

if TYPE_CHECKING:
    from neuroada.adapter.layer import NeuroAdaLinear

SUMS = ("linear", "cat")
"""Both are the weighted sum of the changes: side by side or added up, sparse changes give the same weight."""
PRUNING = {"magnitude_prune": "magnitude", "ties": "magnitude", "dare_linear": "random", "dare_ties": "random"}


def add_weighted_adapter(
    model: Any,
    adapters: list[str],
    weights: list[float],
    name: str,
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add the adapter `name`, whose change of the weights combines those of `adapters`, by the rules of PEFT's LoRA.

    linear, cat: sum of weight x change. magnitude_prune, dare_linear: the same after `density` of each adapter's deltas
    are kept (the largest; or random ones, scaled up). ties, dare_ties: pruned, then of each connection only the deltas
    of the majority's sign are averaged. A row with fewer connections than the widest is filled up with deltas of zero.
    """
    _check(model, adapters, weights, name, combination_type, density)
    first = model.peft_config[adapters[0]]
    model.peft_config[name] = type(first)(
        **{
            **_fields(first),
            "k": 1,
            "k_pattern": None,
            "selection": "magnitude",
            "neuron_fraction": 1.0,
            "base_fingerprint": None,
        }
    )
    model.peft_config[name].target_modules = {layer.name for layer in _layers(model, adapters)}
    model.inject_adapter(model.model, name)
    sizes: dict[str, int] = {}
    for layer in _layers(model, adapters):
        own = [
            (adapter, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if adapter in layer.neuroada_idx
        ]
        idx, deltas = _align([_connections(layer, adapter, combination_type, density) for adapter, _ in own])
        scale = torch.tensor([weight for _, weight in own], dtype=deltas.dtype, device=deltas.device)[:, None, None]
        if combination_type.endswith("ties"):
            signs = calculate_majority_sign_mask(deltas, method=majority_sign_method)  # type: ignore[arg-type]
            combined = disjoint_merge(deltas * scale, signs)
        else:
            combined = (deltas * scale).sum(0)
        layer.neuroada_idx[name] = nn.Parameter(pack_indices(idx), requires_grad=False)
        layer.neuroada_delta[name] = nn.Parameter(combined, requires_grad=False)
        sizes[layer.name] = idx.shape[1]
    config = model.peft_config[name]
    config.k = max(sizes.values())
    config.k_pattern = {_literal(layer): k for layer, k in sizes.items() if k != config.k} or None


def _check(
    model: Any, adapters: list[str], weights: list[float], name: str, combination_type: str, density: float | None
) -> None:
    known = [adapter for adapter in model.peft_config if adapter != name]
    if unknown := [adapter for adapter in adapters if adapter not in known]:
        raise UserError(f"adapters: {unknown[0]!r} is not one of the model's ({', '.join(known)})")
    if not adapters or len(weights) != len(adapters):
        raise UserError(f"weights: {len(weights)} for {len(adapters)} adapters; give each adapter one")
    if any(len(layer.base.neurons) > 1 for layer in _layers(model, adapters)):
        raise UserError("adapters: those of experts (target_parameters) cannot be combined; merge one at a time")
    if name in model.peft_config:
        raise UserError(f"adapter_name: {name!r} is taken; choose another")
    if combination_type not in (*SUMS, *PRUNING):
        raise UserError(
            f"combination_type = {combination_type!r}: must be one of {', '.join((*SUMS, *PRUNING))}; the forms by "
            f"singular values are of low-rank adapters"
        )
    if combination_type in PRUNING and not (density is not None and 0 <= density <= 1):
        raise UserError(f"density = {density}: {combination_type} keeps this fraction of the deltas, from 0 to 1")
    if not all(sharding.is_whole(layer.base.stored) for layer in _layers(model, adapters)):
        raise UserError("add_weighted_adapter: the model is sharded; combine the adapters in one process and save them")


def _fields(config: Any) -> dict[str, Any]:
    from dataclasses import fields

    return {
        field.name: getattr(config, field.name) for field in fields(config) if field.init and field.name != "peft_type"
    }


def _layers(model: Any, adapters: list[str]) -> list["NeuroAdaLinear"]:
    found = {layer.name: layer for adapter in adapters for layer in model.adapted_layers(adapter)}
    return list(found.values())


def _literal(name: str) -> str:
    return name.replace(".", r"\.")


def _connections(
    layer: "NeuroAdaLinear", adapter: str, combination_type: str, density: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """idx [out, k] int64 and delta [out, k], pruned where the combination asks for it."""
    delta = layer.neuroada_delta[adapter].detach()
    if combination_type in PRUNING:
        assert density is not None
        method = PRUNING[combination_type]
        delta = prune(delta, density, method=method, rescale=method == "random")  # type: ignore[arg-type]
    return unpack_indices(layer.neuroada_idx[adapter]), delta


def _align(connections: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of the connections: idx [out, k], ascending and without repetitions; deltas [adapters, out, k]."""
    rows = len(connections[0][0])
    columns = 1 + max(int(idx.max()) for idx, _ in connections)
    used = torch.zeros(rows, columns, dtype=torch.bool, device=connections[0][0].device)
    for idx, _ in connections:
        used.scatter_(1, idx, True)
    k = int(used.sum(1).max())
    # columns in use first, then unused ones to fill up: a stable sort keeps each kind ascending
    union = used.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    deltas = torch.stack(
        [
            torch.zeros(rows, columns, dtype=d.dtype, device=d.device).scatter_(1, i, d).gather(1, union)
            for i, d in connections
        ]
    )
    return union, deltas
