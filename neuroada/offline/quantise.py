"""A base checkpoint, quantised once into a folder that every later run loads at once."""

import time
from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import new_folder, write_json
from neuroada.files.names import match
from neuroada.hf.model_folder import FLOATS
from neuroada.hf.quantised import quantised_layers
from neuroada.hf.quantised_config import KEY, as_quantised
from neuroada.hf.tensor_files import Checkpoint
from neuroada.offline.convert import Stored, convert
from neuroada.offline.output import companions, copy_companions
from neuroada.quantised import PackedRows, Quantisation


def quantise_folder(model: Path, out: Path, quantisation: Quantisation, progress: bool = False) -> dict[str, Any]:
    """Write `out`: `model` with the Linear layers of its blocks stored as `<module>.packed`, all else as it is.

    Its config.json names format, block and exact entries. Memory: one block of rows.
    """
    started = time.monotonic()
    source = Checkpoint(model)
    if source.config.get(KEY):
        raise UserError(f"--model {model}: is already quantised; give the original checkpoint")
    changes = {}
    for module, rows in quantised_layers(str(model), quantisation).items():
        tensor = source.tensors.get(match(f"{module}.weight", source.tensors) or "")
        if tensor is None or tensor.dtype not in FLOATS or tensor.shape[1:] != (rows.inputs,):
            raise UserError(f"--model {model}: has no floating point {module}.weight of {rows.inputs} columns")
        changes[tensor.name] = _packed(tensor.name, rows)
    size = source.size + sum(path.stat().st_size for path in companions(model))
    with new_folder(out, size=size, field="--out ") as folder:
        copy_companions(model, folder)
        written = convert(source, folder, changes, progress)
        write_json(folder / "config.json", as_quantised(source.config, quantisation), indent=2)
    return {
        "out": str(out),
        "format": quantisation.describe(),
        "layers": len(changes),
        "bytes": written,
        "bytes_before": sum(tensor.size for tensor in source.tensors.values()),
        "seconds": round(time.monotonic() - started, 2),
    }


def _packed(name: str, rows: PackedRows) -> Stored:
    return Stored(name.removesuffix("weight") + "packed", "U8", rows.row_bytes, 1, lambda _, part: rows.encode(part))
