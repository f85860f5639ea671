"""Phase 1 on files: the connections of every target module, chosen from a checkpoint without building its model."""

import difflib
import hashlib
import multiprocessing
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from neuroada import sharding
from neuroada.adapter.fingerprint import checksum
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.selection import Selection, select_top_k
from neuroada.adapter.streaming.checkpoint import FLOATS, Checkpoint, StoredTensor, match, one_thread
from neuroada.errors import UserError
from neuroada.ops import MAX_IN_FEATURES, pack_indices, unpack_indices


def select(
    model: Path,
    k: int,
    out: Path,
    *,
    selection: Selection = "magnitude",
    seed: int = 0,
    target_modules: list[str] | None = None,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Choose k connections for every neuron of the target modules and write them to the file `out`.

    The same choice as `select_top_k` on the loaded weights. `target_modules`: whole names or their ends; None: the
    tuner's for config.json's model_type. `workers` processes take a tensor each; memory of each: one block of rows.

    The file: `<module>.idx` [out, 2k] uint8; in its metadata k, selection, seed, base_fingerprint (of the values under
    the connections, as in an adapter's configuration) and sha256 (of the indices).
    """
    started = time.monotonic()
    if out.exists():
        raise UserError(f"--out {out}: is already there; choose a new file or remove it")
    source = Checkpoint(model)
    targets = _targets(source, target_modules)
    _check(targets, k)
    job = partial(_select_tensor, k=k, selection=selection, seed=seed)
    in_file_order = sorted(targets.items(), key=lambda item: (item[1].file, item[1].start))
    with tqdm(total=len(targets), unit="tensor", disable=None if progress else True, leave=False) as bar:
        found = {}
        for module, idx, base in _map(job, in_file_order, workers):
            found[module] = torch.from_numpy(idx), torch.from_numpy(base).view(torch.bfloat16)
            bar.update()
    connections = {module: found[module][0] for module in sorted(found)}
    base_fingerprint = checksum((module, *found[module]) for module in connections)
    write_selection(out, connections, k, selection, seed, base_fingerprint)
    read = sum(tensor.size for tensor in targets.values())
    return {
        "out": str(out),
        "k": k,
        "selection": selection,
        "layers": len(connections),
        "connections": sum(idx.numel() // 2 for idx in connections.values()),
        "base_fingerprint": base_fingerprint,
        "bytes_read": read,
        "bytes": out.stat().st_size,
        "seconds": round(time.monotonic() - started, 2),
    }


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
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_file = out.with_name(f".{out.name}.partial")
    save_file({f"{module}.idx": idx for module, idx in connections.items()}, partial_file, metadata)
    partial_file.replace(out)


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
    layers = {layer.name: layer for layer in model.layers(adapter)}
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
        with sharding.own_rows(layer.base_layer.weight) as (rows, weight):
            layer.set_connections(adapter, rows, idx[rows].to(weight.device), weight)

    def stored() -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
        for key, idx_bytes in sorted(connections.items()):
            yield key, idx_bytes, layers[names[key]].base_values(adapter)

    if (found := checksum(stored())) != metadata["base_fingerprint"]:
        raise UserError(
            f"{path}: was made from other weights than the model's (base_fingerprint "
            f"{metadata['base_fingerprint']}, here {found}); select from this model"
        )
    config.selection, config.seed = metadata["selection"], int(metadata["seed"])


def _targets(source: Checkpoint, wanted: list[str] | None) -> dict[str, StoredTensor]:
    """Module name -> weight."""
    matrices = {
        name.removesuffix(".weight"): tensor
        for name, tensor in source.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    if wanted is None:
        kind = str(source.config.get("model_type"))
        wanted = NeuroAdaModel.target_module_mapping.get(kind)
        if wanted is None:
            raise UserError(f"--target-modules: none are known for model_type {kind}; name them")
    ends = sorted({name.rpartition(".")[2] for name in matrices})
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4) or ends
            raise UserError(f"--target-modules {target}: no such weight matrix; there are {', '.join(near[:8])}")
    return {
        name: tensor
        for name, tensor in matrices.items()
        if any(name == target or name.endswith(f".{target}") for target in wanted)
    }


def _check(targets: Mapping[str, StoredTensor], k: int) -> None:
    for name, tensor in targets.items():
        columns = tensor.shape[1]
        if tensor.dtype not in FLOATS:
            raise UserError(f"{name} is {tensor.dtype}, not one of {', '.join(FLOATS)}; give the model unquantised")
        if k > columns:
            raise UserError(f"--k {k}: {name} has only {columns} inputs; choose k <= {columns}")
        if columns > MAX_IN_FEATURES:
            raise UserError(f"--target-modules: {name} has {columns} inputs, more than {MAX_IN_FEATURES}; leave it out")


def _select_tensor(
    item: tuple[str, StoredTensor], k: int, selection: Selection, seed: int
) -> tuple[str, np.ndarray, np.ndarray]:
    """(module, idx [out, 2k] uint8, base values [out, k] bf16 bits): arrays travel between processes."""
    module, tensor = item
    rows = tensor.shape[0]
    idx_bytes = torch.empty(rows, 2 * k, dtype=torch.uint8)
    base = torch.empty(rows, k, dtype=torch.bfloat16)
    for first, block in tensor.blocks():
        here = slice(first, first + len(block))
        idx = select_top_k(block, k, selection, first_row=first, seed=seed)
        values = block.gather(1, idx)
        if not torch.isfinite(values).all():
            raise UserError(f"{module}.weight holds values that are not finite: the checkpoint is damaged")
        idx_bytes[here], base[here] = pack_indices(idx), values
    return module, idx_bytes.numpy(), base.view(torch.int16).numpy()


def _map(job: Any, items: list[Any], workers: int) -> Iterable[Any]:
    """`job` of every item, in this process or in several, with one thread in each."""
    if workers > 1:
        # fork: a process that imports torch anew takes longer to start than LLaMA-7B takes it to read.
        with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
            yield from pool.imap(job, items)
        return
    with one_thread():
        yield from map(job, items)


def _content_hash(connections: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for module in sorted(connections):
        digest.update(module.encode())
        digest.update(connections[module].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The connections and the metadata, checked against the file's own sha256."""
    try:
        connections = {name.removesuffix(".idx"): idx for name, idx in load_file(path).items()}
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a selection file ({error}); make one with launch/select.py") from None
    if absent := {"k", "selection", "seed", "base_fingerprint", "sha256"} - metadata.keys():
        raise UserError(f"{path}: not a selection file (no {min(absent)}); make one with launch/select.py")
    if _content_hash(connections) != metadata["sha256"]:
        raise UserError(f"{path}: is damaged (its sha256 differs); make it again with launch/select.py")
    return connections, metadata
