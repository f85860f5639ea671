"""Ways for messages to travel: in process, through a folder, over torch.distributed. Others are easy: it is bytes.

`publish` and `follow` are all that a training loop and an inference engine need.
"""

import os
import re
import secrets
from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from neuroada.errors import UserError
from neuroada.files.atomic import replacing
from neuroada.files.reading import open_regular
from neuroada.sync.message import MAX_BYTES, SyncError, peek
from neuroada.sync.receiver import Receiver
from neuroada.sync.sender import Sender


class Transport(Protocol):
    def send(self, message: bytearray) -> None:
        """Sender: bring this rank's part to every receiver."""

    def asked(self) -> bool:
        """Sender: whether a receiver has asked for a state message since the last call."""

    def receive(self) -> list[bytearray]:
        """Receiver: the messages that are new."""

    def ask(self) -> None:
        """Receiver: ask for a state message."""


def publish(sender: Sender, transport: Transport) -> int:
    """Send the next version, as a state message where a receiver has asked. Every rank calls it. -> the version."""
    transport.send(sender.message(state=sender.agree(transport.asked())))
    return sender.version


def follow(receiver: Receiver, transport: Transport) -> int | None:
    """Apply what is new, and ask for a state message where something is missing. -> the version that is there.

    Raises:
        SyncError: another sender has begun (`receiver.restore()` follows it). WrongBase: see `Receiver.apply`.
    """
    lacking = False
    for message in transport.receive():
        try:
            if receiver.apply(message):
                lacking = False
        except SyncError as error:
            if error.needs == "restore":
                raise
            lacking |= error.needs == "state"
    if lacking:
        transport.ask()
    return receiver.version


class Pipe:
    """In one process: a queue. Safe between a training thread and a serving one; for one receiver."""

    def __init__(self) -> None:
        self._messages: deque[bytearray] = deque()
        self._asked = False

    def send(self, message: bytearray) -> None:
        self._messages.append(message)

    def asked(self) -> bool:
        asked, self._asked = self._asked, False
        return asked

    def receive(self) -> list[bytearray]:
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def ask(self) -> None:
        self._asked = True


class FolderTransport:
    """A folder that sender and receivers see, such as a network file system's: one file a message, renamed into place.

    Any number of receivers. A sender removes its files of versions before the last `keep`, and at its start those of
    senders before it; a receiver that was away for longer asks, by a file of its own, and the next version is a state
    message.
    """

    def __init__(self, folder: Path | str, keep: int = 8, limit: int = MAX_BYTES) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keep = keep
        self.limit = limit
        self._seen: dict[str, int] = {}  # the last version read, by stream
        self._name = secrets.token_hex(8)

    def send(self, message: bytearray) -> None:
        header = peek(message)
        file = _File(header.stream, header.version, header.part, header.parts, header.kind)
        write_file(self.folder / file.name, message)
        for old in self._files():
            mine = old.stream == header.stream and old.part == header.part
            if (mine and old.version <= header.version - self.keep) or (
                old.stream != header.stream and not header.part
            ):
                (self.folder / old.name).unlink(missing_ok=True)

    def asked(self) -> bool:
        requests = list(self.folder.glob("request-*"))
        for request in requests:
            request.unlink(missing_ok=True)
        return bool(requests)

    def receive(self) -> list[bytearray]:
        """The messages of every version after the last one read whose parts are all there.

        A receiver that has read nothing yet begins at the newest state message.
        """
        versions: dict[tuple[str, int], list[_File]] = {}
        for file in self._files():
            versions.setdefault((file.stream, file.version), []).append(file)
        whole = {key: files for key, files in versions.items() if len(files) == files[0].parts}
        messages = []
        for (stream, version), files in sorted(whole.items()):
            if stream not in self._seen:
                states = [
                    number for (its, number), found in whole.items() if its == stream and found[0].kind == "state"
                ]
                self._seen[stream] = max(states, default=version) - 1
            if version <= self._seen[stream]:
                continue
            self._seen[stream] = version
            for file in files:
                try:
                    messages.append(read_file(self.folder / file.name, self.limit))
                except UserError as error:
                    if not isinstance(error.__cause__, FileNotFoundError):
                        raise
                    break  # removed meanwhile: the receiver sees the gap, and asks
        return messages

    def ask(self) -> None:
        write_file(self.folder / f"request-{self._name}", b"state")

    def _files(self) -> list["_File"]:
        found = [_File.parse(path.name) for path in self.folder.glob("*.safetensors")]
        return sorted(file for file in found if file is not None)


class _File(NamedTuple):
    """What a message's file name says."""

    stream: str
    version: int
    part: int
    parts: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.stream}-{self.version:010d}-{self.part:05d}-of-{self.parts:05d}.{self.kind}.safetensors"

    @classmethod
    def parse(cls, name: str) -> "_File | None":
        match = re.fullmatch(r"(\w+)-(\d{10})-(\d{5})-of-(\d{5})\.(state|values)\.safetensors", name)
        return match and cls(match[1], int(match[2]), int(match[3]), int(match[4]), match[5])


def write_file(path: Path, data: bytes | bytearray) -> None:
    """Write under a temporary name, and rename: a reader sees all of a file or none."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_file(path: Path, limit: int = MAX_BYTES) -> bytearray:
    """A message's bytes; of a file longer than `limit` one byte more than that, which `decode` refuses."""
    with open_regular(path) as file:
        data = bytearray(min(os.fstat(file.fileno()).st_size, limit + 1))
        return data[: file.readinto(data)]


class DistributedTransport:
    """Over a process group that trainer and receivers share: each receiver answers a round, each trainer rank sends.

    Both sides call it as often: `publish` on every trainer rank meets `follow` on every receiver. A request made in one
    round is answered in the next.

    Args:
        senders, receivers: global ranks.
        device: where the bytes travel: "cpu" for gloo, the rank's GPU for NCCL.
    """

    def __init__(
        self,
        senders: list[int],
        receivers: list[int],
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        limit: int = MAX_BYTES,
    ) -> None:
        self.senders, self.receivers, self.group, self.device, self.limit = senders, receivers, group, device, limit
        self._lacking = False

    def send(self, message: bytearray) -> None:
        payload = torch.frombuffer(message, dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(message)], device=self.device)
        for receiver in self.receivers:
            dist.send(size, receiver, group=self.group)
            dist.send(payload, receiver, group=self.group)

    def asked(self) -> bool:
        flag = torch.zeros(1, dtype=torch.int64, device=self.device)
        asked = False
        for receiver in self.receivers:
            dist.recv(flag, receiver, group=self.group)
            asked |= bool(flag.item())
        return asked

    def receive(self) -> list[bytearray]:
        flag = torch.tensor([int(self._lacking)], device=self.device)
        self._lacking = False
        for sender in self.senders:
            dist.send(flag, sender, group=self.group)
        return [self._receive_from(sender) for sender in self.senders]

    def _receive_from(self, sender: int) -> bytearray:
        size = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(size, sender, group=self.group)
        if not 0 < size.item() <= self.limit:
            raise SyncError(f"rank {sender} announces a message of {size.item()} bytes: at most {self.limit} are read")
        data = bytearray(int(size.item()))
        view = torch.frombuffer(data, dtype=torch.uint8)
        payload = view if self.device == "cpu" else torch.empty_like(view, device=self.device)
        dist.recv(payload, sender, group=self.group)
        if payload is not view:
            view.copy_(payload)
        return data

    def ask(self) -> None:
        self._lacking = True
