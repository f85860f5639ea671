"""A checksum of the base weights under an adapter's connections: does this adapter belong to these weights?"""

import hashlib
from collections.abc import Iterable

import torch

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear


def fingerprint(layers: Iterable[NeuroAdaLinear], adapter: str) -> str:
    """16 hexadecimal digits of a SHA-256 over the layers' names, indices and base values. Collective when sharded.

    The values are rounded to bf16 first, so that loading the base in fp32 or in bf16 gives the same fingerprint.
    """
    digest = hashlib.sha256()
    for layer in sorted(layers, key=lambda layer: layer.name):
        if adapter not in layer.neuroada_idx:
            continue
        digest.update(layer.name.encode())
        with sharding.whole(layer.neuroada_idx[adapter]) as idx, sharding.whole(layer.neuroada_base[adapter]) as base:
            digest.update(idx.cpu().numpy().tobytes())
            digest.update(base.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
