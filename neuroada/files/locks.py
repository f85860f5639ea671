"""One command at a time in a folder: a lock file that names its owner's machine and process."""

import fcntl
import json
import os
import platform
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from neuroada.errors import UserError
from neuroada.files.problems import explained

_NAME = ".neuroada.lock"
_ENDED = -1
_held: dict[Path, int] = {}  # lock file -> how often this process holds it


class FolderLock:
    """A lock on `folder`, taken by `acquire` or as a context manager; of several ranks, rank 0 takes it for all.

    The file lies in the folder, which is made if need be, or `beside` it, for a folder that is to appear whole. A
    process may take its own lock again. A lock whose owner is gone is taken over: a process of this machine that has
    ended, or the same SLURM job before it was requeued. A kill leaves the file behind, and does no harm.

    Raises (acquire):
        UserError: another process holds it; machine, process and remedy in one line.
    """

    def __init__(self, folder: Path, *, beside: bool = False, field: str = "") -> None:
        self.folder, self.field = Path(folder), field
        # absolute, not resolved: the folder may not exist yet, and appear later
        place = self.folder.absolute()
        self._made = False
        self.file = place.with_name(f".{place.name[:100]}.lock") if beside else place / _NAME

    def acquire(self) -> None:
        if _held.get(self.file):
            _held[self.file] += 1
            return
        with explained(f"{self.field}{self.folder}"):
            self._made = not self.file.parent.exists()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._link():
                self._take_over()
        _held[self.file] = 1

    def release(self) -> None:
        if not _held.get(self.file):
            return
        _held[self.file] -= 1
        if not _held[self.file]:
            del _held[self.file]
            with suppress(OSError):
                if _read(self.file) == _me():  # never another's, who was told that this process is gone
                    self.file.unlink()
                if self._made:
                    self.file.parent.rmdir()  # where nothing was written

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _link(self) -> bool:
        """Create the lock file with its content at once; False where there is one."""
        mine = self.file.with_name(f"{self.file.name}.{secrets.token_hex(8)}")
        try:
            mine.write_text(json.dumps(_me()))
            try:
                os.link(mine, self.file)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                try:
                    with self.file.open("x") as file:
                        json.dump(_me(), file)
                except FileExistsError:
                    return False
            return True
        finally:
            mine.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Remove the file of an owner that is gone; UserError if it is not."""
        try:
            handle = os.open(self.file, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            with suppress(OSError):  # of two that find it stale one removes it, and the other looks again
                fcntl.flock(handle, fcntl.LOCK_EX)
            owner = _read(self.file)
            if _gone(owner):
                with suppress(FileNotFoundError):
                    if os.fstat(handle).st_ino == self.file.stat().st_ino:
                        self.file.unlink()
                return
        finally:
            os.close(handle)
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        raise UserError(
            f"{self.field}{self.folder}: {who} is writing it; wait for its end, choose another folder, or, if it is "
            f"gone, remove {self.file}"
        )


def alive(pid: int, started: int | None = None) -> bool:
    """Whether a process of this machine runs; `started`: and is the one that started then (numbers are used again)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    found = _started(pid)
    return found != _ENDED and (started is None or found in (None, started))


def _started(pid: int) -> int | None:
    """A process's start in clock ticks since the machine's; None where /proc does not tell; of a zombie, _ENDED."""
    try:
        # after the second field, the command in brackets, which may hold blanks and brackets; the start is the 22nd
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return _ENDED if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _me() -> dict[str, Any]:
    pid, job, life = os.getpid(), os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    life = life if life.isascii() and life.isdecimal() else "0"
    return {"host": platform.node(), "pid": pid, "started": _started(pid), "job": job, "life": int(life)}


def _read(file: Path) -> dict[str, Any] | None:
    """The owner that a lock file names; None where it names none."""
    try:
        owner = json.loads(file.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"host": str, "pid": int, "started": int | None, "job": str | None, "life": int}
    if isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in kinds.items()):
        return owner
    return None


def _gone(owner: dict[str, Any] | None) -> bool:
    if owner is None:
        return False
    if owner["host"] == platform.node():
        return not alive(owner["pid"], owner["started"])
    me = _me()
    return me["job"] is not None and me["job"] == owner["job"] and me["life"] > owner["life"]
