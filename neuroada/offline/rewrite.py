"""A checkpoint copied block by block, with some of its tensors changed on the way: same names, dtypes, order, files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neuroada.errors import UserError
from neuroada.files import open_regular, read_header
from neuroada.hf.model_folder import FLOATS, all_finite
from neuroada.hf.tensor_files import BLOCK, DTYPES, Checkpoint, blocks, one_thread, read_exactly

Edit = Callable[[int, torch.Tensor], None]  # (first row, rows): changes the rows in place


def rewrite(
    source: Checkpoint, out: Path, edits: Mapping[str, Edit], progress: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Write `source`'s files into the folder `out`; the tensors named in `edits` pass through them, in file order.

    All other bytes, headers among them, are copied as they are. Memory: one block. Returns the `Checksum` of each file
    as it was read, and as it was written. UserError: a weight that holds NaN or infinity.
    """
    silent = None if progress else True  # None: where there is no terminal
    read, written = {}, {}
    with one_thread(), tqdm(total=source.size, unit="B", unit_scale=True, disable=silent, leave=False) as bar:
        for path in source.files:
            before, after = Checksum(), Checksum()
            with (
                open_regular(path) as original,
                (out / path.name).open("wb") as copy,
            ):
                tensors = read_header(path)[0]
                _copy(original, copy, 0, tensors[0].start if tensors else path.stat().st_size, (before, after), bar)
                for tensor in tensors:
                    if tensor.dtype not in DTYPES:
                        _copy(original, copy, tensor.start, tensor.start + tensor.size, (before, after), bar)
                        continue
                    edit = edits.get(tensor.name) if source.tensors.get(tensor.name) == tensor else None
                    checked = tensor.dtype in FLOATS and tensor.name.endswith((".weight", ".bias"))
                    for first, rows in blocks(tensor):
                        before.add(rows)
                        if checked and not all_finite(rows):
                            raise UserError(f"{path}: {tensor.name} holds NaN or infinity: the checkpoint is damaged")
                        if edit is not None:
                            edit(first, rows)
                        after.add(rows)
                        copy.write(memoryview(rows.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                        bar.update(rows.nbytes)
            read[path.name], written[path.name] = str(before), str(after)
    return read, written


class Checksum:
    """64 bits over the blocks of a file, in order: finds accidents at the speed of memory, and is no signature.

    The sum of a block's 8-byte words, times an odd number that differs from block to block.
    """

    def __init__(self) -> None:
        self.total, self.count = 0, 0

    def add(self, block: torch.Tensor) -> None:
        data = block.view(-1).view(torch.uint8)
        whole = len(data) // 8 * 8
        words = int(data[:whole].view(torch.int64).sum()) if whole else 0
        rest = int.from_bytes(data[whole:].numpy().tobytes(), "little")
        self.count += 1
        self.total = (self.total + (words + rest + len(data)) * (2 * self.count + 1)) % 2**64

    def __str__(self) -> str:
        return f"{self.total:016x}"


def _copy(source: Any, target: Any, start: int, stop: int, sums: tuple[Checksum, Checksum], bar: Any) -> None:
    """Bytes start:stop."""
    buffer = torch.empty(min(BLOCK, stop - start), dtype=torch.uint8)
    source.seek(start)
    for at in range(start, stop, BLOCK):
        part = buffer[: min(BLOCK, stop - at)]
        read_exactly(source, part)
        for checksum in sums:
            checksum.add(part)
        target.write(part.numpy())
        bar.update(len(part))
