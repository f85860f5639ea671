"""Safetensors files, and the weights of a model's folder, checked before a tensor of them is read."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from neuroada.errors import UserError
from neuroada.files.atomic import replacing
from neuroada.files.problems import as_user_error
from neuroada.files.reading import MAX_BYTES, check_inside, member, open_regular, parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, the format's own bound
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of an element, by the names that safetensors writes."""

_FOREIGN = {
    b"PK\x03\x04": "a pickle of torch.save",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, whose content was never fetched",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: `size` bytes from `start`, row-major."""

    name: str
    file: Path
    dtype: str  # as safetensors writes it: BF16, F32, ...
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(file: Path, remedy: str = "fetch or save it again") -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file in the order they lie in it, and its metadata. No tensor is read.

    UserError: not a whole safetensors file: another format, cut, empty, a header that is too large, is not JSON, or
    places a tensor outside the file or over another one.
    """
    text = b""
    with open_regular(file, remedy) as opened:
        total = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        wrong = _not_safetensors(start + opened.read(24), total, length)
        if wrong is None:
            opened.seek(8)
            text = opened.read(length)
    if wrong is not None:
        raise UserError(f"{file}: {wrong}; {remedy}")
    try:
        header = parse_json(text.decode("utf-8"), f"{file}, header", remedy)
    except UnicodeDecodeError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a safetensors file (its header is no JSON object); {remedy}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{file}: its __metadata__ must hold texts; {remedy}")
    tensors = sorted(
        (_stored(file, name, entry, 8 + length, remedy) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.size),
    )
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise UserError(f"{file}: {tensor.name!r} begins at byte {tensor.start:,}, expected {end:,}; {remedy}")
        end += tensor.size
    if end != total:
        raise UserError(
            f"{file}: not a whole safetensors file ({total:,} bytes, its header tells of {end:,}); {remedy}"
        )
    return tensors, metadata


def _not_safetensors(start: bytes, total: int, length: int) -> str | None:
    """What is wrong with a file of `total` bytes that begins with `start`, of which `length` would be its header."""
    if not total:
        return "is empty"
    for mark, what in _FOREIGN.items():
        if start.startswith(mark) and start[8:9] != b"{":
            return f"is {what}, not a safetensors file"
    if total < 10 or length > total - 8:
        return f"not a whole safetensors file ({total:,} bytes, its header would have {length:,})"
    return f"its header has {length:,} bytes, more than {MAX_HEADER:,}" if length > MAX_HEADER else None


def _stored(file: Path, name: str, entry: Any, base: int, remedy: str) -> StoredTensor:
    """One entry of a header, each number checked."""

    def sizes(key: str) -> tuple[int, ...] | None:
        found = entry.get(key) if isinstance(entry, dict) else None
        good = isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)
        return tuple(found) if good and found is not None else None

    shape, offsets = sizes("shape"), sizes("data_offsets")
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(f"{file}: {name!r} has the unknown dtype {str(dtype)[:20]!r}; {remedy}")
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > 32:
        raise UserError(f"{file}: {name!r} has no proper shape and data_offsets; {remedy}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise UserError(f"{file}: {name!r} has {end - begin:,} bytes, which are not {dtype} {list(shape)}; {remedy}")
    return StoredTensor(name, file, dtype, shape, base + begin, end - begin)


@contextmanager
def open_tensors(file: Path, remedy: str = "fetch or save it again") -> Iterator[Any]:
    """safetensors' own handle (`keys`, `metadata`, `get_tensor`, `get_slice`) of a checked file, for torch on a CPU."""
    read_header(file, remedy)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{file}: {' '.join(str(error).split())[:200]}; {remedy}") from None
    except OSError as error:
        raise as_user_error(error, error.filename or file) from error


def load_tensors(file: Path, remedy: str = "fetch or save it again") -> tuple[dict[str, Any], dict[str, str]]:
    """Every torch tensor of a file by its name, on the CPU, and the file's metadata."""
    with open_tensors(file, remedy) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def save_tensors(file: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write torch tensors, or numpy arrays, whole or not at all. UserError: the disk's errors."""
    arrays = bool(tensors) and type(next(iter(tensors.values()))).__module__ == "numpy"
    save_file: Any = import_module("safetensors.numpy" if arrays else "safetensors.torch").save_file
    with replacing(file) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:  # a full disk, mostly
            said = " ".join(str(error).split())
            raise UserError(f"{file}: could not be written ({said[:200]}); free some space and try again") from error


def weight_files(folder: Path, field: str = "model = ") -> dict[str, StoredTensor]:
    """The weights of a model's folder, by name, as transformers loads them: model.safetensors, or the index's shards.

    Every header is checked, no tensor read. Nothing outside the folder is opened (but a hub cache's own blobs).
    UserError: no safetensors there, an index that is wrong or names a file or tensor that is not there.
    """
    told, again = f"{field}{folder}", "fetch the model again"
    if (folder / SINGLE).exists():
        check_inside(folder, folder / SINGLE)
        return {tensor.name: tensor for tensor in read_header(folder / SINGLE, again)[0]}
    if not (folder / INDEX).exists():
        pickles = any(folder.glob("*.bin")) if folder.is_dir() else False
        what = "only pickled weights (.bin), which are not read" if pickles else f"neither {SINGLE} nor {INDEX}"
        raise UserError(f"{told}: holds {what}; save the model there with save_pretrained")
    check_inside(folder, folder / INDEX)
    index = read_json(folder / INDEX, limit=MAX_BYTES, remedy=again)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: has no weight_map; {again}")
    stored: dict[str, dict[str, StoredTensor]] = {}
    for name in weight_map.values():
        if isinstance(name, str) and name in stored:
            continue
        file = member(folder, name, f"the index names it; {again}")
        if not file.is_file():
            raise UserError(f"{told}: {INDEX} names {name}, which is not there; {again}")
        stored[name] = {tensor.name: tensor for tensor in read_header(file, again)[0]}
    for name, file_name in weight_map.items():
        if name not in stored[file_name]:
            raise UserError(f"{told}: {INDEX} places {name} in {file_name}, which does not hold it; {again}")
    return {name: stored[file_name][name] for name, file_name in weight_map.items()}
