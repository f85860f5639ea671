"""Generations on their way: every rank appends its finished batches to a file of its own; a restart skips them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from pydantic import RootModel

from neuroada.files import check_schema, open_append, read_json_lines, read_text, write_text

Key = tuple[str, int]  # a task's name, the number of one of its batches


class Part(RootModel[tuple[str, int, list[str]]]):
    """A line of a part file."""


class Parts:
    """The folder of part files, shared by all ranks (on a file system that all of them see)."""

    def __init__(self, folder: Path, fingerprint: str | None, rank: int, barrier: Callable[[], None]) -> None:
        """Keep what was done under the same `fingerprint`, remove the rest. None: nothing is kept. Collective."""
        self._folder = folder
        self._file: IO[str] | None = None
        self._rank = rank
        if rank == 0:
            key = folder / "fingerprint"
            if fingerprint is None or not key.is_file() or read_text(key) != fingerprint:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._gather()
            write_text(key, fingerprint or "")
        barrier()
        self.done = self._read()

    def write(self, key: Key, generations: Sequence[str]) -> None:
        """Append one finished batch, and flush it."""
        if self._file is None:
            self._file = open_append(self._folder / f"rank{self._rank}.jsonl")
        self._file.write(json.dumps([*key, list(generations)]) + "\n")
        self._file.flush()

    def collect(self) -> dict[Key, list[str]]:
        """All finished batches, of all ranks."""
        return self._read()

    def remove(self) -> None:
        """Everything has been used: forget it."""
        shutil.rmtree(self._folder)

    def _gather(self) -> None:
        """One clean file in place of those of an earlier run, whose last lines may be torn."""
        lines = [json.dumps([*key, generations]) + "\n" for key, generations in self._read().items()]
        write_text(self._folder / "done.jsonl", "".join(lines))
        for path in self._folder.glob("rank*.jsonl"):
            path.unlink()

    def _read(self) -> dict[Key, list[str]]:
        done = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in read_json_lines(path, limit=1 << 34, torn=True):
                task, number, generations = check_schema(Part, line, str(path), "remove it").root
                done[task, number] = generations
        return done
