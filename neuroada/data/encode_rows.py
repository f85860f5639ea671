"""Rows of one source to tokens, in several processes where there are many.

One process reads; checking, rendering by the chat template and tokenising are done a chunk of rows at a time, and the
chunks come back in their order: the result, and the first error, do not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from neuroada.data.encoding import Counts, Encoder, Tokens
from neuroada.data.formats import RowError, RowReader
from neuroada.data.sources import Row
from neuroada.errors import UserError

CHUNK = 1024  # rows given to the tokenizer at once: enough for its threads
PART = 128  # rows given to a process at once: several are under way, and rows may be long
MAX_PROCESSES = 8  # one process reads and writes for all: it could not feed more


@dataclass(frozen=True)
class Chunk:
    """What became of some neighbouring rows."""

    rows: list[tuple[str, list[list[Tokens]] | RowError]]  # where each stands; its units, or what is wrong with it
    counts: Counts


class RowEncoder:
    """Encodes chunks of one source's rows. The first row that can be read decides the format, and so `reader`."""

    def __init__(self, encoder: Encoder, make_reader: Callable[[Any], RowReader]) -> None:
        self.encoder, self.make_reader = encoder, make_reader
        self.reader: RowReader | None = None

    def __call__(self, rows: Iterable[Row]) -> Chunk:
        self.encoder.counts = counts = Counts()
        found = [(row.where, self._rendered(row)) for row in rows]
        units = self.encoder.encode([texts for _, texts in found if not isinstance(texts, RowError)])
        return Chunk([(where, one if isinstance(one, RowError) else next(units)) for where, one in found], counts)

    def _rendered(self, row: Row) -> list[list[Any]] | RowError:
        try:
            if row.error is not None:
                raise RowError(row.error)
            self.reader = self.reader or self.make_reader(row.values)
            return self.encoder.render(self.reader(row.values))
        except RowError as error:
            return error


def encode_rows(encode: RowEncoder, rows: Iterator[Row]) -> Generator[Chunk, None, None]:
    """The chunks of all rows, in order; close it when no more are wanted. UserError: a process was killed."""
    for chunk in _chunks(rows, CHUNK):
        yield encode(chunk)
        if encode.reader is not None:
            break
    coming = list(islice(rows, CHUNK))
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    if len(coming) < CHUNK or processes < 2:
        yield from map(encode, _chunks(chain(coming, rows), CHUNK))
    else:
        yield from _in_processes(encode, _chunks(chain(coming, rows), PART), processes)


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    return iter(lambda: list(islice(rows, size)), [])


def _in_processes(encode: RowEncoder, chunks: Iterator[list[Row]], processes: int) -> Iterator[Chunk]:
    # fork: the tokenizer and the template are there at once, and nothing is imported again.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start, (encode,))
    pending: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_work, chunk))
            if len(pending) > 2 * processes:  # so that no more than these are in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("data.datasets: a process that encodes rows was killed; see whether memory ran out") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---- in a process of the pool

_encode: RowEncoder


def _start(encode: RowEncoder) -> None:
    global _encode
    _encode = encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the process that reads decides when to stop
        signal.signal(asked, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: list[Row]) -> Chunk:
    return _encode(chunk)
