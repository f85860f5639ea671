"""A checkpoint copied block by block, with some of its tensors stored in another way: new names, dtypes and widths.

`rewrite` is for changes that keep the headers.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from neuroada.files import StoredTensor, read_json, write_json
from neuroada.files.tensors import INDEX
from neuroada.hf.tensor_files import BLOCK, Checkpoint, blocks, one_thread, read_exactly


class Stored(NamedTuple):
    """How a matrix is stored anew: its rows pass through `rows`, (first row, rows) -> rows [., columns] of `dtype`."""

    name: str
    dtype: str  # as safetensors writes it
    columns: int
    item_bytes: int
    rows: Callable[[int, torch.Tensor], torch.Tensor]


def convert(source: Checkpoint, out: Path, changes: Mapping[str, Stored], progress: bool = False) -> int:
    """Write `source`'s files into the folder `out`, the tensors named in `changes` as they say; returns their bytes.

    An index there is rewritten. Memory: one block.
    """
    total = 0
    places: dict[str, str] = {}
    with one_thread(), tqdm(total=source.size, unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        for path in source.files:
            tensors = sorted((t for t in source.tensors.values() if t.file == path), key=lambda tensor: tensor.start)
            header, size = _header(tensors, changes)
            total, places = total + size, places | {name: path.name for name in header if name != "__metadata__"}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (out / path.name).open("wb") as copy:
                copy.write(len(text).to_bytes(8, "little") + text)
                for tensor in tensors:
                    change = changes.get(tensor.name)
                    for first, rows in blocks(tensor) if change else _bytes(tensor):
                        new = change.rows(first, rows) if change else rows
                        copy.write(memoryview(new.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                        bar.update(rows.nbytes)
                copy.flush()
                os.fsync(copy.fileno())
    if (source.folder / INDEX).exists():
        index = read_json(source.folder / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(out / INDEX, index | {"weight_map": places}, indent=2)
    return total


def _header(tensors: list[StoredTensor], changes: Mapping[str, Stored]) -> tuple[dict, int]:
    """The new file's header, in the old order, and the bytes of its tensors."""
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        name, dtype, shape, size = tensor.name, tensor.dtype, list(tensor.shape), tensor.size
        if (change := changes.get(tensor.name)) is not None:
            name, dtype, shape = change.name, change.dtype, [tensor.shape[0], change.columns]
            size = shape[0] * change.columns * change.item_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


def _bytes(tensor: StoredTensor):
    """(offset, bytes) of a tensor that is copied as it is."""
    buffer = torch.empty(min(BLOCK, tensor.size), dtype=torch.uint8)
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for at in range(0, tensor.size, BLOCK):
            part = buffer[: min(BLOCK, tensor.size - at)]
            read_exactly(file, part)
            yield at, part
