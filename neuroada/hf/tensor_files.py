"""A Hugging Face folder's safetensors files, opened without reading them: what they hold, and any tensor by rows."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neuroada.errors import UserError
from neuroada.files import StoredTensor, open_regular, read_json, weight_files

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Types of models whose layers are transformers' Conv1D: stored [in, out]."""
BLOCK = 1 << 22  # bytes read at once, unless one row is larger: enough for the disk, little enough for a CPU's cache
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def blocks(tensor: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) in order. The memory is used again for the next block: copy what is to stay."""
    rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = tensor.size // rows if rows else 0
    rows_at_once = max(1, BLOCK // max(1, row_bytes))
    # Pages of its own: in the heap, what is kept of one block would settle in the hole the last block left.
    buffer = torch.frombuffer(mmap.mmap(-1, max(1, min(rows, rows_at_once) * row_bytes)), dtype=torch.uint8)
    with open_regular(tensor.file) as file:
        file.seek(tensor.start)
        for first in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - first)
            part = buffer[: count * row_bytes]
            read_exactly(file, part)
            yield first, part.view(DTYPES[tensor.dtype]).view(count, *tensor.shape[1:])


def read_exactly(file: Any, buffer: torch.Tensor) -> None:
    """Fill a uint8 tensor from an unbuffered file, which may return less than asked for."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    while view:
        if not (count := file.readinto(view)):
            raise UserError(f"{file.name}: ends early; it changed while it was read")
        view = view[count:]


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks are too small to share: on a busy machine torch's threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Checkpoint:
    """The model in a folder, as transformers would load it: model.safetensors, or the shards its index names.

    `files`: paths; `tensors`: name -> StoredTensor. UserError as of `weight_files`.
    """

    def __init__(self, folder: Path, field: str = "--model ") -> None:
        self.folder = folder
        self.tensors = weight_files(folder, field)
        self.files = sorted({tensor.file for tensor in self.tensors.values()})

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        config = read_json(self.folder / "config.json", remedy="a Hugging Face folder has one")
        if not isinstance(config, dict):
            raise UserError(f"{self.folder / 'config.json'}: must be an object; fetch the model again")
        return config

    @property
    def has_conv1d(self) -> bool:
        """Whether its layers' neurons are their weights' columns. Nothing is concluded from shapes: some are square."""
        return self.config.get("model_type") in CONV1D

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        return {name: tensor.file for name, tensor in self.tensors.items()}

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)


def resolve(source: str, field: str, revision: str | None = None) -> Path:
    """A folder as it is; a hub id as the folder of its downloaded snapshot."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{field} {source}: no such folder; give one, or a hub id such as yahma/llama-7b-hf")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        unused = ["consolidated*", "original/*"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=unused))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field} {source}: no such folder, and not fetched from the hub ({reason})") from None
