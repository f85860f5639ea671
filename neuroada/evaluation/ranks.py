"""What ranks that evaluate together share: barriers, Python objects, and the lock of the folder they write into."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from neuroada.errors import UserError
from neuroada.files import FolderLock


@dataclass(frozen=True)
class Ranks:
    """The processes that evaluate together; group None: this one alone. Every method is collective."""

    rank: int = 0
    world_size: int = 1
    group: Any = None

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def scatter(self, parts: Sequence[Any] | None = None) -> Any:
        """Each rank its part of what rank 0 gives. parts: of every rank; None elsewhere."""
        if self.group is None:
            assert parts is not None
            return parts[0]
        received: list[Any] = [None]
        dist.scatter_object_list(received, None if parts is None else list(parts), src=0, group=self.group)
        return received[0]

    def gather(self, part: Any) -> list[Any]:
        """On rank 0 what every rank gives; [] elsewhere."""
        if self.group is None:
            return [part]
        received = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(part, received, dst=0, group=self.group)
        return received or []


@contextmanager
def locked(out: Path, rank: int) -> Iterator[None]:
    """The folder's lock, which rank 0 holds for all. Collective; UserError on every rank if it is another's."""
    lock, problem = FolderLock(out, field="--out "), [None]
    if rank == 0:
        try:
            lock.acquire()
        except UserError as error:
            problem = [str(error)]  # type: ignore[list-item]
    if dist.is_initialized():
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    try:
        yield
    finally:
        lock.release()


@contextmanager
def joined() -> Iterator[Ranks]:
    """All ranks, over gloo on any device: what they exchange is no tensor of the model's, and may wait for hours."""
    if not dist.is_initialized():
        yield Ranks()
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)
