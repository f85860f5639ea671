"""An adapter that was trained over a quantised base, merged into dense weights.

Into the dequantised ones, it is what was trained. Into the original ones, it is usual practice, and a little else: the
deltas have also learnt to mend the quantisation. Into quantised ones it would be lost: rounding is as large as deltas.
"""

import math
from pathlib import Path
from typing import Any

import torch

from neuroada.adapter.adapter_file import AdapterFile
from neuroada.adapter.fingerprint import checksum, with_format
from neuroada.errors import UserError
from neuroada.files import new_folder, write_json
from neuroada.files.names import match
from neuroada.hf.model_folder import FLOATS
from neuroada.hf.quantised import quantised_layers
from neuroada.hf.quantised_config import KEY, as_dense
from neuroada.hf.tensor_files import DTYPES, Checkpoint
from neuroada.offline.convert import Stored, convert
from neuroada.offline.output import companions, copy_companions
from neuroada.ops import adapted, read_entries, unpack_indices, write_entries
from neuroada.quantised import PackedRows, Quantisation


class Dense:
    """One matrix on its way: quantised or not yet, dequantised, its entries changed.

    `base` [out, k]: the values the adapter was trained over. error, norm: squared, of quantisation and of the original.
    """

    def __init__(self, rows: PackedRows, packed: bool, original: bool, connections: Any, dtype: torch.dtype) -> None:
        self.rows, self.packed, self.original, self.dtype = rows, packed, original, dtype
        self.idx: Any
        self.delta: Any
        self.idx, self.delta = connections or (None, None)
        self.base = torch.empty(0) if connections is None else torch.empty(self.delta.shape, dtype=dtype)
        self.error = self.norm = 0.0

    def __call__(self, first: int, rows: torch.Tensor) -> torch.Tensor:
        stored = rows if self.packed else self.rows.encode(rows)
        weight = self.rows.decode(stored, self.dtype)
        here = slice(first, first + len(rows))
        idx = None if self.idx is None else unpack_indices(self.idx[here])
        if idx is not None:
            self.base[here] = read_entries(weight, idx)
        if not self.packed:
            self.error += float((weight.float() - rows.float()).square().sum())
            self.norm += float(rows.float().square().sum())
        if self.original:
            weight = rows.clone()
        if idx is not None:
            write_entries(weight, idx, adapted(read_entries(weight, idx), self.delta[here]))
        return weight


def merge_quantised(
    adapter: AdapterFile,
    quantisation: Quantisation,
    base: Path,
    out: Path,
    *,
    original: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the merged, dense model to `out`: over `base`, the original checkpoint or a quantised folder.

    original: into the original weights instead of the dequantised ones. Memory: the adapter, the base values under its
    connections, one block. UserError: the base is not the one the adapter was trained on; `out` does not appear then.
    """
    source = Checkpoint(base, "--base-model ")
    connections = adapter.connections
    packed = source.config.get(KEY) is not None
    if packed and Quantisation.from_json(source.config[KEY], f"--base-model {base}: {KEY}") != quantisation:
        raise UserError(
            f"--base-model {base}: the adapter was trained on a base {quantisation.describe()}; give that one"
        )
    if packed and original:
        raise UserError(f"--into original: {base} is quantised; give the original checkpoint as --base-model")
    dense: dict[str, Dense] = {}
    changes: dict[str, Stored] = {}
    for module, rows in quantised_layers(str(base), quantisation).items():
        name = match(f"{module}.packed" if packed else f"{module}.weight", source.tensors)
        if name is None or (not packed and source.tensors[name].dtype not in FLOATS):
            raise UserError(f"--base-model {base}: has no {'packed' if packed else 'floating point'} {module}")
        dtype = "BF16" if packed else source.tensors[name].dtype
        dense[module] = made = Dense(rows, packed, original, connections.get(module), DTYPES[dtype])
        target = name.removesuffix("packed") + "weight" if packed else name
        changes[name] = Stored(target, dtype, rows.inputs, DTYPES[dtype].itemsize, made)
    if unknown := set(connections) - set(dense):
        raise UserError(f"--base-model {base}: {min(unknown)} is not one of its quantised layers")
    size = sum(len(made.delta) * made.rows.inputs * 2 for made in dense.values() if made.idx is not None)
    size += source.size + sum(path.stat().st_size for path in companions(base))
    with new_folder(out, size=size, field="--out ") as folder:
        copy_companions(base, folder)
        written = convert(source, folder, changes, progress)
        write_json(folder / "config.json", as_dense(source.config), indent=2)
        found = checksum((module, connections[module][0], dense[module].base) for module in sorted(connections))
        found = with_format(quantisation, found)
        if found != adapter.config.base_fingerprint:
            raise UserError(
                f"--base-model {base}: the adapter was trained on other base weights (base_fingerprint "
                f"{adapter.config.base_fingerprint}, here {found}); give the folder it was trained on"
            )
    error, norm = (sum(getattr(made, name) for made in dense.values()) for name in ("error", "norm"))
    return {
        "layers": len(connections),
        "connections": sum(delta.numel() for _, delta in connections.values()),
        "bytes": written,
        "into": "original weights" if original else f"weights dequantised from {quantisation.describe()}",
        **({} if packed else {"quantisation_error": f"{math.sqrt(error / norm):.4f} of the weights' norm"}),
    }
