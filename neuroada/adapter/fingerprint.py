"""A checksum of the base weights under an adapter's connections: does this adapter belong to these weights?"""

import hashlib
import re
from collections.abc import Iterable, Iterator

import torch

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.quantised import FORMATS, Quantisation

Connections = tuple[str, torch.Tensor, torch.Tensor]


def fingerprint(layers: Iterable[NeuroAdaLinear], adapter: str) -> str:
    """The checksum of the layers that carry this adapter, after the base's format if it is quantised: "nf4:20:...".

    The format belongs to it: with exact entries, a quantised base has the original's values under the connections.
    Collective when sharded.
    """
    found = [layer for layer in layers if adapter in layer.neuroada_idx]
    return with_format(quantisation_of(found), checksum(_connections(found, adapter)))


def quantisation_of(layers: Iterable[NeuroAdaLinear]) -> Quantisation | None:
    """How these layers' base is quantised."""
    return next((layer.quantisation for layer in layers if layer.quantisation), None)


def with_format(quantisation: Quantisation | None, found: str) -> str:
    return found if quantisation is None else f"{quantisation.format}:{quantisation.exact}:{found}"


def quantisation_in(base_fingerprint: str | None) -> Quantisation | None:
    """How the base was quantised that has this fingerprint."""
    match = re.fullmatch(rf"({'|'.join(FORMATS)}):(\d+):[0-9a-f]+", base_fingerprint or "")
    return Quantisation(match[1], int(match[2])) if match else None


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
