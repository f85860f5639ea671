"""What ranks that evaluate together share: a barrier, and the lock of the folder that they write into."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from neuroada.errors import UserError
from neuroada.files import FolderLock


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
def joined() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """(rank, world size, barrier). The barrier is gloo's on any device: it carries no tensor and may wait for hours."""
    if not dist.is_initialized():
        yield 0, 1, lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    try:
        yield dist.get_rank(), dist.get_world_size(), lambda: dist.barrier(group)
    finally:
        dist.destroy_process_group(group)
