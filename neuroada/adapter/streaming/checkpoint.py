"""A Hugging Face folder's safetensors files, opened without reading them: what they hold, and any tensor by rows."""

import json
import mmap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neuroada.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: `size` bytes from `start`, row-major."""

    name: str
    file: Path
    dtype: str  # as safetensors writes it: BF16, F32, ...
    shape: tuple[int, ...]
    start: int
    size: int

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) in order. The memory is used again for the next block: copy what is to stay."""
        rows = self.shape[0] if self.shape else 1
        row_bytes = self.size // rows if rows else 0
        rows_at_once = max(1, BLOCK // max(1, row_bytes))
        # Pages of its own: in the heap, what is kept of one block would settle in the hole the last block left.
        buffer = torch.frombuffer(mmap.mmap(-1, max(1, min(rows, rows_at_once) * row_bytes)), dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, rows, rows_at_once):
                count = min(rows_at_once, rows - first)
                part = buffer[: count * row_bytes]
                read_exactly(file, part)
                yield first, part.view(DTYPES[self.dtype]).view(count, *self.shape[1:])


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


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file in the order they lie in it. UserError where the file is damaged or cut off."""
    try:
        with safe_open(file, framework="pt"):  # checks sizes, offsets and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or save it again") from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors.append(StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin))
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.size))


class Checkpoint:
    """The model in a folder, as transformers would load it: model.safetensors, or the shards its index names.

    `files`: paths; `tensors`: name -> StoredTensor. UserError: no safetensors, missing shards, an index that is wrong.
    """

    def __init__(self, folder: Path, field: str = "--model") -> None:
        self.folder = folder
        weight_map = self._weight_map(field)
        self.files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in self.files if not file.is_file()]:
            raise UserError(f"{field} {folder}: {INDEX} names {missing[0]}, which is not there; fetch the model again")
        self.headers = {file.name: read_header(file) for file in self.files}
        stored = {(name, tensor.name): tensor for name, header in self.headers.items() for tensor in header}
        self.tensors: dict[str, StoredTensor] = {}
        for name, file in weight_map.items():
            if (file, name) not in stored:
                raise UserError(f"{field} {folder}: {INDEX} places {name} in {file}, which does not hold it")
            self.tensors[name] = stored[file, name]

    def _weight_map(self, field: str) -> dict[str, str]:
        if (self.folder / SINGLE).is_file():
            return {tensor.name: SINGLE for tensor in read_header(self.folder / SINGLE)}
        if not (self.folder / INDEX).is_file():
            raise UserError(
                f"{field} {self.folder}: holds neither {SINGLE} nor {INDEX}; save the model there with save_pretrained"
            )
        try:
            weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
            names = {name: Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.folder / INDEX}: not an index with a weight_map; fetch the model again") from None
        if not names or names != weight_map:
            raise UserError(f"{self.folder / INDEX}: weight_map must name files of its own folder; fetch it again")
        return names

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{self.folder / 'config.json'}: missing or not JSON; a Hugging Face folder has one")
        return config

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)


def match(name: str, known: Collection[str]) -> str | None:
    """`name` as `known` spells it, which may carry the base model's prefix where `name` has none, or the reverse.

    transformers loads both into both: "model.layers.0..." of a model with a head, "layers.0..." of a bare one.
    """
    for spelling in (name, name.partition(".")[2]):
        if spelling in known:
            return spelling
    longer = [spelling for spelling in known if spelling.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def resolve(source: str, field: str, revision: str | None = None) -> Path:
    """A folder as it is; a hub id as the folder of its downloaded snapshot."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{field} {source}: no such folder; give one, or a hub id such as yahma/llama-7b-hf")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        unused = ["consolidated*", "original/*"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=unused))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field} {source}: no such folder, and not fetched from the hub ({reason})") from None
