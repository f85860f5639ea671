"""A checksum of the base weights under an adapter's connections: does this adapter belong to these weights?"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from neuroada import sharding
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.errors import UserError
from neuroada.quantised import Quantisation

Connections = tuple[str, torch.Tensor, torch.Tensor]


def fingerprint(layers: Iterable[NeuroAdaLinear], adapter: str) -> str:
    """The checksum of the layers that carry this adapter. Collective when sharded."""
    return checksum(_connections(layers, adapter))


def record_base(config: NeuroAdaConfig, layers: Iterable[NeuroAdaLinear], adapter: str) -> None:
    """Note in an adapter's configuration which base it was trained on. Collective when sharded."""
    found = [layer for layer in layers if adapter in layer.neuroada_idx]
    config.base_fingerprint, quantisation = fingerprint(found, adapter), _quantisation(found)
    config.base_quantisation = None if quantisation is None else quantisation.as_json()


def check_base(config: NeuroAdaConfig, layers: Sequence[NeuroAdaLinear], adapter: str) -> None:
    """Refuse an adapter that was trained on another base: other weights, or weights stored otherwise.

    Both are compared: with exact entries, a quantised base has the original's values under the connections.
    """
    if config.base_fingerprint is None:
        return
    remedy = "load it over the base model it names, or set base_fingerprint to null in its adapter_config.json"
    named, found = config.base_quantisation, _quantisation(layers)
    trained = named and Quantisation.from_json(named, f"adapter {adapter!r}: base_quantisation")
    if trained != found:
        told = [what.describe() if what else "not quantised" for what in (trained, found)]
        raise UserError(f"adapter {adapter!r} was trained on a base {told[0]}, this one is {told[1]}: {remedy}")
    if (here := fingerprint(layers, adapter)) != config.base_fingerprint:
        raise UserError(
            f"adapter {adapter!r} was trained on other base weights (base_fingerprint {config.base_fingerprint}, here "
            f"{here}): {remedy}"
        )


def _quantisation(layers: Iterable[NeuroAdaLinear]) -> Quantisation | None:
    return next((layer.quantisation for layer in layers if layer.quantisation), None)


def checksum(connections: Iterable[Connections]) -> str:
    """16 hexadecimal digits of a SHA-256 over (name, idx [out, 2k] uint8, base [out, k]), given in the order of names.

    The values are rounded to bf16 first, so that loading the base in fp32 or in bf16 gives the same checksum.
    """
    digest = hashlib.sha256()
    for name, idx, base in connections:
        digest.update(name.encode())
        digest.update(idx.cpu().numpy().tobytes())
        digest.update(base.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _connections(layers: Iterable[NeuroAdaLinear], adapter: str) -> Iterator[Connections]:
    for layer in sorted(layers, key=lambda layer: layer.name):
        if adapter not in layer.neuroada_idx:
            continue
        base = layer.base_values(adapter)
        with sharding.whole(layer.neuroada_idx[adapter]) as idx:
            yield layer.name, idx, base
