"""A message as bytes: a safetensors file whose metadata holds a JSON header and a SHA-256 over all the rest.

So a message in a folder is readable by any tool that knows safetensors, and nothing in it is ever executed. Reading is
bounded: sizes are checked against the bytes that are there before anything is built from them, and tensors are views
of the message.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from neuroada.errors import UserError
from neuroada.files.reading import parse_json

FORMAT = 1
MAX_BYTES = 4 << 30
"""Of a message: LLaMA-70B's whole state at k = 20, from one rank, is 0.8 GB."""
MAX_HEADER_BYTES = 64 << 20

Kind = Literal["state", "values"]
_METADATA, _HEADER, _CHECKSUM = "__metadata__", "neuroada_sync", "sha256"
_UNSET = "0" * 64
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WrongBase(UserError):
    """The receiver's base weights are not those that the adapter belongs to. No message helps."""


class SyncError(UserError):
    """A message that must not be applied. The weights are as they were before it.

    needs: what lets the receiver go on. "state": a state message, and nothing less. "nothing": the message came late or
    twice, and what it brought is there. "restore": it is of another sender, which is followed after `restore()`.
    """

    def __init__(self, message: str, needs: Literal["state", "nothing", "restore"] = "state") -> None:
        super().__init__(message)
        self.needs = needs


@dataclass(frozen=True)
class Module:
    """One adapted weight in a state message: its shape [out, in], k, and the rows that this part holds of it."""

    shape: tuple[int, int]
    k: int
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    format: of messages; this code reads 1.
    kind: "state" (everything: modules, indices, base values, values) or "values" (values alone).
    stream: names the sender; versions of different senders cannot be compared.
    version: 0, 1, 2, ... of the sender, whichever kind.
    part, parts: a version is whole when one message of each of `parts` ranks is there.
    layout: names the modules, rows, indices and base values that the values belong to, of this part.
    modules: of a state message, by name.
    """

    kind: Kind
    stream: str
    version: int
    adapter: str
    part: int
    parts: int
    layout: str
    modules: dict[str, Module] | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class Message:
    """A decoded message. Tensors are views of its bytes, by module name.

    values [rows, k] in the weight's dtype; of a state message also idx [rows, 2k] uint8 and base [rows, k].
    """

    header: Header
    values: dict[str, torch.Tensor]
    idx: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]


def encode(message: Message) -> bytearray:
    """The bytes of a message, from tensors on any device."""
    tensors = {
        f"{name}.{kind}": tensor.detach()
        for kind in ("values", "base", "idx")  # wide elements first, which leaves all of them aligned
        for name, tensor in getattr(message, kind).items()
    }
    entries: dict[str, Any] = {
        _METADATA: {_HEADER: json.dumps(asdict(message.header), separators=(",", ":")), _CHECKSUM: _UNSET}
    }
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    start = 8 + len(head)
    data = bytearray(start + offset)
    data[:start] = len(head).to_bytes(8, "little") + head
    body = torch.frombuffer(data, dtype=torch.uint8)
    for name, tensor in tensors.items():
        first, last = entries[name]["data_offsets"]
        body[start + first : start + last] = tensor.contiguous().view(torch.uint8).flatten()
    where = data.index(f'"{_CHECKSUM}":"{_UNSET}"'.encode(), 0, start) + len(_CHECKSUM) + 4
    data[where : where + 64] = hashlib.sha256(data).hexdigest().encode()
    return data


def decode(data: bytes | bytearray, limit: int = MAX_BYTES) -> Message:
    """Read a message; its tensors share `data`'s memory where that is a bytearray.

    Raises:
        SyncError: damaged, longer than `limit`, of another format, or inconsistent in itself.
    """
    if len(data) > limit:
        raise SyncError(f"message of {len(data)} bytes: at most {limit} are read; raise the limit or send more parts")
    try:
        return _decode(data if isinstance(data, bytearray) else bytearray(data))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SyncError):
            raise
        raise SyncError(f"message of {len(data)} bytes is damaged ({error}): have it sent again") from None


def peek(data: bytes | bytearray) -> Header:
    """The header of a message that this process made itself, without a look at the rest."""
    head, _ = _read_head(data)
    return _read_header(head[_METADATA][_HEADER])


def _read_head(data: bytes | bytearray) -> tuple[dict[str, Any], int]:
    """The safetensors header, and where the tensors begin."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 + size or size > MAX_HEADER_BYTES:
        raise ValueError("its end is missing")
    return parse_json(bytes(data[8 : 8 + size]).decode(), "its header", "have it sent again"), 8 + size


def _decode(data: bytearray) -> Message:
    head, start = _read_head(data)
    metadata = head.pop(_METADATA)
    _check_sum(data, start, metadata[_CHECKSUM])
    header = _read_header(metadata[_HEADER])
    found: dict[str, dict[str, torch.Tensor]] = {"values": {}, "idx": {}, "base": {}}
    offset = 0
    for name, entry in head.items():
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if len(shape) != 2 or not all(0 <= size < 1 << 40 for size in shape) or first != offset:
            raise ValueError(f"{name} is not where it should be")
        if last - first != math.prod(shape) * dtype.itemsize or start + last > len(data):
            raise ValueError(f"{name} is shorter than its shape")
        module, _, kind = name.rpartition(".")
        body = torch.frombuffer(data, dtype=torch.uint8)[start + first : start + last]
        found[kind][module] = body.view(dtype).view(shape) if len(body) else torch.empty(shape, dtype=dtype)
        offset = last
    if start + offset != len(data):
        raise ValueError("it holds more than its header says")
    message = Message(header, **found)
    _check_modules(message)
    return message


def _check_sum(data: bytearray, start: int, checksum: str) -> None:
    """Compare with the SHA-256 of the message in which the checksum's own digits are zeros."""
    where = data.find(f'"{_CHECKSUM}":"{checksum}"'.encode(), 0, start) + len(_CHECKSUM) + 4
    view = memoryview(data)
    digest = hashlib.sha256(view[:where])
    digest.update(_UNSET.encode())
    digest.update(view[where + 64 :])
    if digest.hexdigest() != checksum:
        raise ValueError("its checksum differs")


def _read_header(text: str) -> Header:
    fields = parse_json(text, "its header", "have it sent again")
    modules = fields.pop("modules")
    header = Header(**fields)
    if header.format != FORMAT:
        raise SyncError(f"message of format {header.format}: this version reads {FORMAT}; install the sender's version")
    numbers = (header.version, header.part, header.parts)
    if header.kind not in ("state", "values") or not all(type(number) is int for number in numbers):
        raise ValueError("its header is not of this format")
    if not (header.version >= 0 and 0 <= header.part < header.parts) or (modules is None) != (header.kind == "values"):
        raise ValueError("its header contradicts itself")
    if modules is None:
        return header
    read = {name: Module(tuple(one["shape"]), one["k"], one["first"], one["last"]) for name, one in modules.items()}
    return Header(**fields, modules=read)


def _check_modules(message: Message) -> None:
    """That a state message's tensors fit what its header says of its modules."""
    modules = message.header.modules
    if modules is None:
        if message.idx or message.base:
            raise ValueError("a values message holds more than values")
        return
    for name, module in modules.items():
        rows = module.last - module.first
        if not 0 <= module.first <= module.last <= module.shape[0] or len(module.shape) != 2:
            raise ValueError(f"{name} has no such rows")
        shapes = [tensor[name].shape for tensor in (message.values, message.base, message.idx)]
        if shapes != [(rows, module.k), (rows, module.k), (rows, 2 * module.k)]:
            raise ValueError(f"{name} is not of the shape its header gives")
        if message.values[name].dtype != message.base[name].dtype or message.idx[name].dtype != torch.uint8:
            raise ValueError(f"{name} is not of the type it should be")
    if not modules.keys() == message.values.keys() == message.base.keys() == message.idx.keys():
        raise ValueError("it holds modules that its header does not name")
