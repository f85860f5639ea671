"""An adapter that was trained over a quantised base, merged: into dense weights, or into quantised ones.

Into the dequantised weights, it is what was trained; so it is into the quantised ones, whose codes stay as they are,
with the trained entries exact beside them. (To quantise again would lose it: rounding is as large as deltas.) Into the
original weights, it is usual practice, and a little else: the deltas have also learnt to mend the quantisation.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from neuroada.adapter.adapter_file import AdapterFile
from neuroada.adapter.fingerprint import checksum, with_format
from neuroada.errors import UserError
from neuroada.files import StoredTensor, new_folder, write_json
from neuroada.files.names import match
from neuroada.hf.model_folder import FLOATS
from neuroada.hf.quantised import quantised_layers
from neuroada.hf.quantised_config import KEY, as_dense, as_quantised
from neuroada.hf.tensor_files import DTYPES, Checkpoint, blocks, one_thread
from neuroada.offline.convert import Stored, convert
from neuroada.offline.matrices import Dense, Matrix, Repacked
from neuroada.offline.module_weights import verify_quantised
from neuroada.offline.output import companions, copy_companions
from neuroada.ops import unpack_indices
from neuroada.quantised import PackedRows, Quantisation

Into = Literal["dequantised", "original", "quantised"]


class Base(NamedTuple):
    """What is merged into: its matrices as they are to be quantised and as they are stored, by module."""

    source: Checkpoint
    quantisation: Quantisation
    packed: bool  # whether its files are quantised
    layers: Mapping[str, PackedRows]
    tensors: Mapping[str, StoredTensor]


class Plan(NamedTuple):
    """What becomes of each matrix: by module, and by tensor of the files; and the new config.json."""

    matrices: Mapping[str, Matrix]
    changes: Mapping[str, Stored]
    config: dict[str, Any]
    dtype: torch.dtype  # that the result computes in as the adapter over its base does
    told: dict[str, Any]  # the result, in words


def merge_quantised(
    adapter: AdapterFile,
    quantisation: Quantisation,
    base: Path,
    out: Path,
    *,
    into: Into = "dequantised",
    verify: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the merged model to `out`: over `base`, the original checkpoint or a quantised folder.

    into: dequantised or original weights, a dense checkpoint then; or quantised, a folder as `quantise_folder` writes
    it, with more exact entries where the adapter's are not among them (the base is read twice). Memory: the adapter,
    the base values under its connections, one block. UserError: the base is not the one the adapter was trained on, or
    with `verify` the logits differ; `out` does not appear then.
    """
    _check(adapter, into, verify)
    source = Checkpoint(base, "--base-model ")
    connections = adapter.connections
    packed = source.config.get(KEY) is not None
    if packed and Quantisation.from_json(source.config[KEY], f"--base-model {base}: {KEY}") != quantisation:
        raise UserError(
            f"--base-model {base}: the adapter was trained on a base {quantisation.describe()}; give that one"
        )
    if packed and into == "original":
        raise UserError(f"--into original: {base} is quantised; give the original checkpoint as --base-model")
    layers = quantised_layers(str(base), quantisation)
    if unknown := set(connections) - set(layers):
        raise UserError(f"--base-model {base}: {min(unknown)} is not one of its quantised layers")
    tensors = {module: _tensor(source, module, rows, packed) for module, rows in layers.items()}
    found_base = Base(source, quantisation, packed, layers, tensors)
    for module, (idx, _) in connections.items():
        if len(idx) != tensors[module].shape[0] or int(unpack_indices(idx).max()) >= layers[module].inputs:
            raise UserError(
                f"--base-model {base}: {module} has another size than the adapter's; give the adapter's base"
            )
    if into == "quantised":
        plan = _repacked(found_base, connections)
    else:
        plan = _dense(found_base, connections, into == "original")
    size = sum(
        change.columns * change.item_bytes * source.tensors[name].shape[0] for name, change in plan.changes.items()
    )
    size += source.size + sum(path.stat().st_size for path in companions(base))
    with new_folder(out, size=size, field="--out ") as folder:
        copy_companions(base, folder)
        written = convert(source, folder, plan.changes, progress)
        write_json(folder / "config.json", plan.config, indent=2)
        values = ((module, connections[module][0], plan.matrices[module].base) for module in sorted(connections))
        found = with_format(quantisation, checksum(values))
        if found != adapter.config.base_fingerprint:
            raise UserError(
                f"--base-model {base}: the adapter was trained on other base weights (base_fingerprint "
                f"{adapter.config.base_fingerprint}, here {found}); give the folder it was trained on"
            )
        if verify:
            verify_quantised(adapter.folder, base, folder, quantisation, plan.dtype)
    dense = [matrix for matrix in plan.matrices.values() if isinstance(matrix, Dense) and not matrix.packed]
    error, norm = sum(matrix.error for matrix in dense), sum(matrix.norm for matrix in dense)
    return {
        "layers": len(connections),
        "connections": sum(delta.numel() for _, delta in connections.values()),
        "bytes": written,
        "verified": verify,
        **plan.told,
        **({"quantisation_error": f"{math.sqrt(error / norm):.4f} of the weights' norm"} if dense else {}),
    }


def _check(adapter: AdapterFile, into: Into, verify: bool) -> None:
    if adapter.whole:
        raise UserError(
            f"--adapter {adapter.folder}: modules_to_save: not with an adapter of a quantised base; merge it by PEFT's "
            f"merge_and_unload"
        )
    if verify and into == "original":
        raise UserError("--verify: --into original makes another model than was trained; leave one of them out")


def _tensor(source: Checkpoint, module: str, rows: PackedRows, packed: bool) -> StoredTensor:
    tensor = source.tensors.get(match(f"{module}.packed" if packed else f"{module}.weight", source.tensors) or "")
    dtypes, columns = (("U8",), rows.row_bytes) if packed else (FLOATS, rows.inputs)
    if tensor is None or tensor.dtype not in dtypes or tensor.shape[1:] != (columns,):
        kind = "packed" if packed else "floating point"
        raise UserError(
            f"--base-model {source.folder}: has no {kind} {module} of {columns} columns; give the adapter's own base"
        )
    return tensor


def _dense(base: Base, connections: Mapping[str, Any], original: bool) -> Plan:
    matrices: dict[str, Matrix] = {}
    changes: dict[str, Stored] = {}
    for module, rows in base.layers.items():
        name, stored = base.tensors[module].name, "BF16" if base.packed else base.tensors[module].dtype
        matrix = Dense(rows, base.packed, connections.get(module), DTYPES[stored], original)
        target = name.removesuffix("packed") + "weight" if base.packed else name
        changes[name] = Stored(target, stored, rows.inputs, DTYPES[stored].itemsize, matrix)
        matrices[module] = matrix
    told = {"into": "original weights" if original else f"weights dequantised from {base.quantisation.describe()}"}
    return Plan(matrices, changes, as_dense(base.source.config), next(iter(matrices.values())).dtype, told)


def _repacked(base: Base, connections: Mapping[str, Any]) -> Plan:
    made = {module: Repacked(rows, base.packed, connections.get(module)) for module, rows in base.layers.items()}
    with one_thread():
        exact = max(matrix.needed(blocks(base.tensors[module])) for module, matrix in made.items())
    narrowest = min(base.layers, key=lambda module: base.layers[module].inputs)
    if exact > base.layers[narrowest].inputs:
        raise UserError(
            f"--into quantised: rows would have {exact} exact entries, {narrowest} has only "
            f"{base.layers[narrowest].inputs} inputs; use --into dequantised"
        )
    merged = Quantisation(base.quantisation.format, exact, merged=True)
    changes = {}
    for module, matrix in made.items():
        name, matrix.exact = base.tensors[module].name, exact
        target = name if base.packed else name.removesuffix("weight") + "packed"
        row_bytes = PackedRows(merged, matrix.rows.inputs, module).row_bytes
        changes[name] = Stored(target, "U8", row_bytes, 1, matrix)
    told = {"into": f"quantised weights, {merged.describe()}", "exact_before": base.quantisation.exact}
    return Plan(made, changes, as_quantised(base.source.config, merged), torch.bfloat16, told)
