"""Phase 1 on files: the connections of every target module, chosen from a checkpoint without building its model."""

import difflib
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from neuroada.adapter.fingerprint import checksum
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.selection import NEEDS, Selection, lift_scores, select_top_k
from neuroada.adapter.selection_file import write_selection
from neuroada.errors import UserError
from neuroada.files import StoredTensor
from neuroada.hf.model_folder import FLOATS, check_model_folder
from neuroada.hf.tensor_files import Checkpoint, blocks, one_thread
from neuroada.ops import MAX_IN_FEATURES, pack_indices


def select(
    model: Path,
    k: int,
    out: Path,
    *,
    selection: Selection = "magnitude",
    lift_rank: int = 128,
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
    if os.path.lexists(out):
        raise UserError(f"--out {out}: is already there; choose a new file or remove it")
    check_model_folder(model, "--model ")
    source = Checkpoint(model)
    if source.has_conv1d:
        raise UserError(
            f"--model {model}: its layers are Conv1D, whose neurons are columns; leave the choice to `neuroada train`, "
            f"by adapter.selection"
        )
    targets = _targets(source, target_modules)
    _check(targets, k)
    job = partial(_select_tensor, k=k, selection=selection, seed=seed, lift_rank=lift_rank)
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
    item: tuple[str, StoredTensor], k: int, selection: Selection, seed: int, lift_rank: int
) -> tuple[str, np.ndarray, np.ndarray]:
    """(module, idx [out, 2k] uint8, base values [out, k] bf16 bits): arrays travel between processes."""
    module, tensor = item
    rows = tensor.shape[0]
    idx_bytes = torch.empty(rows, 2 * k, dtype=torch.uint8)
    base = torch.empty(rows, k, dtype=torch.bfloat16)
    scores = None
    if NEEDS[selection] == "matrix":
        weight = torch.cat([block.clone() for _, block in blocks(tensor)])
        scores = lift_scores(weight, lift_rank, module, "--lift-rank ")
    for first, block in blocks(tensor):
        here = slice(first, first + len(block))
        ranked = block if scores is None else scores[here]
        idx = select_top_k(ranked, k, selection, first_row=first, seed=seed)
        values = block.gather(1, idx)
        if not torch.isfinite(values).all():
            raise UserError(f"{module}.weight holds values that are not finite: the checkpoint is damaged")
        idx_bytes[here], base[here] = pack_indices(idx), values
    return module, idx_bytes.numpy(), base.view(torch.int16).numpy()


def _map(job: Any, items: list[Any], workers: int) -> Iterable[Any]:
    """`job` of every item, in this process or in several, with one thread in each."""
    workers = min(workers, len(items))
    if workers > 1:
        # fork: a process that imports torch anew takes longer to start than LLaMA-7B takes it to read.
        with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
            yield from pool.imap(job, items)
        return
    with one_thread():
        yield from map(job, items)
