"""A checkpoint copied block by block, with some of its tensors changed on the way: same names, dtypes, order, files."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neuroada.files import StoredTensor
from neuroada.hf.tensor_files import BLOCK, Checkpoint, blocks, one_thread, read_exactly

Edit = Callable[[int, torch.Tensor], None]  # (first row, rows): changes the rows in place


def rewrite(source: Checkpoint, out: Path, edits: Mapping[str, Edit], progress: bool = False) -> None:
    """Write `source`'s files into the folder `out`; the tensors named in `edits` pass through them, in file order.

    All other bytes, headers among them, are copied as they are. Memory: one block.
    """
    silent = None if progress else True  # None: where there is no terminal
    edited: dict[Path, list[StoredTensor]] = {path: [] for path in source.files}
    for tensor in sorted(source.tensors.values(), key=lambda tensor: tensor.start):
        if tensor.name in edits:
            edited[tensor.file].append(tensor)
    with one_thread(), tqdm(total=source.size, unit="B", unit_scale=True, disable=silent, leave=False) as bar:
        for path in source.files:
            with path.open("rb", buffering=0) as original, (out / path.name).open("wb") as copy:
                at = 0
                for tensor in edited[path]:
                    _copy(original, copy, at, tensor.start, bar)
                    for first, rows in blocks(tensor):
                        edits[tensor.name](first, rows)
                        copy.write(memoryview(rows.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                        bar.update(rows.nbytes)
                    at = tensor.start + tensor.size
                _copy(original, copy, at, path.stat().st_size, bar)
                copy.flush()
                os.fsync(copy.fileno())  # the folder gets its name only when its contents are safe


def _copy(source: Any, target: Any, start: int, stop: int, bar: Any) -> None:
    """Bytes start:stop."""
    buffer = torch.empty(min(BLOCK, stop - start), dtype=torch.uint8)
    source.seek(start)
    for at in range(start, stop, BLOCK):
        part = buffer[: min(BLOCK, stop - at)]
        read_exactly(source, part)
        target.write(part.numpy())
        bar.update(len(part))
