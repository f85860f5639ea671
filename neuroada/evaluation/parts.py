"""Generations on their way: every rank appends its finished batches to a file of its own; a restart skips them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

Key = tuple[str, int]  # a task's name, the number of one of its batches


class Parts:
    """The folder of part files, shared by all ranks (on a file system that all of them see)."""

    def __init__(self, folder: Path, fingerprint: str | None, rank: int, barrier: Callable[[], None]) -> None:
        """Keep what was done under the same `fingerprint`, remove the rest. None: nothing is kept. Collective."""
        self._folder = folder
        self._file: IO[str] | None = None
        self._rank = rank
        if rank == 0:
            key = folder / "fingerprint"
            if fingerprint is None or not key.is_file() or key.read_text() != fingerprint:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._gather()
            key.write_text(fingerprint or "")
        barrier()
        self.done = self._read()

    def write(self, key: Key, generations: Sequence[str]) -> None:
        """Append one finished batch, and flush it."""
        if self._file is None:
            self._file = (self._folder / f"rank{self._rank}.jsonl").open("a", encoding="utf-8")
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
        temporary = self._folder / "done.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self._folder / "done.jsonl")
        for path in self._folder.glob("rank*.jsonl"):
            path.unlink()

    def _read(self) -> dict[Key, list[str]]:
        done = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else the writer was cut off here
                    task, number, generations = json.loads(line)
                    done[task, number] = generations
        return done
