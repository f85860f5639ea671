"""A file of connections, chosen before a run: `<module>.idx` [out, 2k] uint8, and what it was made from."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from neuroada.adapter.fingerprint import checksum
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.selection import Selection
from neuroada.errors import UserError
from neuroada.files import load_tensors, save_tensors
from neuroada.files.names import match
from neuroada.ops import unpack_indices


def write_selection(
    out: Path, connections: dict[str, torch.Tensor], k: int, selection: Selection, seed: int, base_fingerprint: str
) -> None:
    """Write the file: module -> [out, 2k] uint8, and what it was made from."""
    metadata = {
        "format": "pt",
        "k": str(k),
        "selection": selection,
        "seed": str(seed),
        "base_fingerprint": base_fingerprint,
        "sha256": _content_hash(connections),
    }
    save_tensors(out, {f"{module}.idx": idx for module, idx in connections.items()}, metadata)


def load_selection(path: Path) -> dict[str, torch.Tensor]:
    """Module -> [out, 2k] uint8. UserError: not a selection, or damaged."""
    return _read(path)[0]


def apply_selection(model: NeuroAdaModel, adapter: str, path: Path) -> None:
    """Give an adapter the connections of a selection file. Collective where the weights are sharded.

    UserError: another k, other target modules or shapes, a selection made from other weights, a damaged file.
    """
    connections, metadata = _read(path)
    config: Any = model.peft_config[adapter]
    if int(metadata["k"]) != config.k:
        raise UserError(f"{path}: was made with k = {metadata['k']}, the adapter has k = {config.k}; use the same")
    layers = {layer.name: layer for layer in model.adapted_layers(adapter)}
    names = {match(name, connections): name for name in layers}
    if missing := [name for name in layers if match(name, connections) is None]:
        raise UserError(f"{path}: holds no connections for {missing[0]}; select for the adapter's target_modules")
    if unused := sorted(connections.keys() - names.keys()):
        raise UserError(f"{path}: holds {unused[0]}, which the adapter does not train; select for its target_modules")
    for key, idx_bytes in connections.items():
        layer = layers[names[key]]
        idx = unpack_indices(idx_bytes)
        if idx.shape != (layer.out_features, config.k) or int(idx.max()) >= layer.in_features:
            raise UserError(
                f"{path}: {key} is {tuple(idx.shape)} up to column {int(idx.max())}, the layer "
                f"{layer.out_features} x {layer.in_features}; select from this model"
            )
        with layer.base.own_rows() as (rows, weight):
            layer.set_connections(adapter, rows, idx[rows].to(weight.device), weight)

    def stored() -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
        for key, idx_bytes in sorted(connections.items()):
            yield key, idx_bytes, layers[names[key]].base_values(adapter)

    if (found := checksum(stored())) != metadata["base_fingerprint"]:
        raise UserError(
            f"{path}: was made from other weights than the model's (base_fingerprint "
            f"{metadata['base_fingerprint']}, here {found}); select from this model"
        )
    config.selection = metadata["selection"]
    if config.neuron_fraction == 1:  # else the seed has chosen the neurons too
        config.seed = int(metadata["seed"])


def _content_hash(connections: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for module in sorted(connections):
        digest.update(module.encode())
        digest.update(connections[module].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The connections and the metadata, checked against the file's own sha256."""
    tensors, metadata = load_tensors(path, "make one with `neuroada select`")
    connections = {name.removesuffix(".idx"): idx for name, idx in tensors.items()}
    if absent := {"k", "selection", "seed", "base_fingerprint", "sha256"} - metadata.keys():
        raise UserError(f"{path}: not a selection file (no {min(absent)}); make one with `neuroada select`")
    if _content_hash(connections) != metadata["sha256"]:
        raise UserError(f"{path}: is damaged (its sha256 differs); make it again with `neuroada select`")
    for module, idx in connections.items():
        if idx.dtype != torch.uint8 or idx.ndim != 2 or idx.shape[1] % 2 or not idx.numel():
            raise UserError(f"{path}: {module} holds no packed indices; make it again with `neuroada select`")
    for field in ("k", "seed"):
        if not re.fullmatch(r"-?\d{1,19}", metadata[field]):
            raise UserError(f"{path}: {field} is {metadata[field]!r}; make it again with `neuroada select`")
    if metadata["selection"] not in get_args(Selection):
        raise UserError(f"{path}: selection is {metadata['selection']!r}; make it again with `neuroada select`")
    return connections, metadata
