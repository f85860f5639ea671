"""What ranks tell each other besides tensors: small objects, and each other's errors."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from neuroada.engines.base import Engine
from neuroada.errors import UserError, node_name

ALONE_SECONDS = 20.0  # then a rank tells its error, if the others have not come to hear it


def gather(engine: Engine, value: Any) -> list[Any]:
    """`value` of every rank, by rank. Collective."""
    if engine.world_size == 1:
        return [value]
    values: list[Any] = [None] * engine.world_size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(engine: Engine) -> Iterator[None]:
    """A UserError in any rank's block ends all ranks with the same line, which names the node if not all met it."""
    problem: str | None = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    # Ranks that met no problem may wait inside the block for this one, for as long as the watchdog lets them.
    alone = threading.Timer(ALONE_SECONDS, _tell, (engine.rank, problem))
    alone.daemon = True
    if problem is not None:
        alone.start()
    found = gather(engine, (node_name(), problem))
    alone.cancel()
    errors = [(node, text) for node, text in found if text is not None]
    if errors:
        node, text = errors[0]
        raise UserError(text if len(errors) == len(found) else f"node {node}: {text}")


def _tell(rank: int, problem: str) -> None:
    print(f"error: node {node_name()} (rank {rank}): {problem}", file=sys.stderr, flush=True)
