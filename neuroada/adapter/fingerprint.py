"""A checksum of the base weights under an adapter's connections: does this adapter belong to these weights?"""

import hashlib
from collections.abc import Iterable, Iterator

import torch

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear

Connections = tuple[str, torch.Tensor, torch.Tensor]


def fingerprint(layers: Iterable[NeuroAdaLinear], adapter: str) -> str:
    """The checksum of the layers that carry this adapter. Collective when sharded."""
    return checksum(_connections(layers, adapter))


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
