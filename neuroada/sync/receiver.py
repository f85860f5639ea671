"""The engine's side: which message may be applied, and which is refused."""

from typing import Protocol

from neuroada.errors import UserError
from neuroada.sync.message import MAX_BYTES, Header, Message, SyncError, decode


class Weights(Protocol):
    """The weights that a receiver changes: a plain model's (`ModelWeights`), or an inference engine's."""

    def load(self, parts: list[Message]) -> None:
        """Take a whole state: put the base back, check it, write the values. On an error nothing has changed."""

    def write(self, parts: list[Message]) -> None:
        """Write new values of the layout that was loaded last."""

    def restore(self) -> None:
        """Put the base back to the bit, and forget the layout."""


class Receiver:
    """Applies the messages of one sender, in order, each version once all its parts are there.

    Not thread-safe: a server holds its lock around `apply` and `restore` (`ReadWriteLock`).
    """

    def __init__(self, weights: Weights, limit: int = MAX_BYTES) -> None:
        self.weights = weights
        self.limit = limit
        self.stream: str | None = None
        self.version: int | None = None
        """That the weights hold; None for the base."""
        self.adapter: str | None = None
        self._layout: list[str] = []
        self._waiting: dict[int, Message] = {}

    def apply(self, data: bytes | bytearray) -> bool:
        """Take one message. -> whether it completed a version, which the weights now hold.

        Raises:
            SyncError: the message is damaged, or not the next one of this stream; nothing has changed. Its
                `needs` tells what helps.
            WrongBase: the model's base is not the one that the adapter belongs to.
        """
        message = decode(data, self.limit)
        try:
            self._check(message.header)
        except SyncError as error:
            if error.needs == "state":
                self._waiting = {}
            raise
        self._waiting[message.header.part] = message
        if len(self._waiting) < message.header.parts:
            return False
        parts = [self._waiting[part] for part in sorted(self._waiting)]
        self._waiting = {}
        self._take(parts)
        return True

    def restore(self) -> None:
        """Put the base back to the bit. The next message must be a state message, of any sender."""
        self.weights.restore()
        self.stream = self.version = self.adapter = None
        self._layout, self._waiting = [], {}

    def _take(self, parts: list[Message]) -> None:
        header = parts[0].header
        version, self.version = self.version, None  # in case it fails half-way: then only a state message helps
        try:
            (self.weights.load if header.kind == "state" else self.weights.write)(parts)
        except UserError:  # refused before anything was written
            self.version = version
            raise
        self.stream, self.version, self.adapter = header.stream, header.version, header.adapter
        self._layout = [part.header.layout for part in parts]

    def _check(self, header: Header) -> None:
        what = f"version {header.version} of {header.adapter!r}, part {header.part + 1} of {header.parts}"
        if self.stream is not None and header.stream != self.stream:
            raise SyncError(
                f"{what} is of another sender ({header.stream}; followed is {self.stream}): call restore() to change",
                "restore",
            )
        if self.version is not None and header.version <= self.version:
            raise SyncError(f"{what} came late or twice: version {self.version} is there", "nothing")
        if self._waiting:
            self._check_part(header, what)
        if header.kind == "values":
            self._check_next(header, what)

    def _check_part(self, header: Header, what: str) -> None:
        first = next(iter(self._waiting.values())).header
        if header.version < first.version:
            raise SyncError(f"{what} came late: parts of version {first.version} are there", "nothing")
        if header.kind == "state" and header.version > first.version:
            self._waiting = {}  # it holds everything: what is missing of an earlier version does not matter
            return
        same = (first.kind, first.stream, first.version, first.adapter, first.parts)
        if same != (header.kind, header.stream, header.version, header.adapter, header.parts):
            missing = first.parts - len(self._waiting)
            raise SyncError(f"{what} came, {missing} of version {first.version} did not: ask for the state")
        if header.part in self._waiting:
            raise SyncError(f"{what} came twice", "nothing")

    def _check_next(self, header: Header, what: str) -> None:
        if self.version is None:
            raise SyncError(f"{what} holds values alone, and no state is there to apply them to: ask for the state")
        if header.version != self.version + 1:
            raise SyncError(f"{what} does not follow version {self.version}, which is there: ask for the state")
        if header.parts != len(self._layout) or header.layout != self._layout[header.part]:
            raise SyncError(f"{what} is of another layout than the state that is there: ask for the state")
