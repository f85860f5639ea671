"""Runs a command in this process, and judges it: the right result, or one line; nothing else touched, nothing left."""

import contextlib
import hashlib
import io
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import command

SECONDS = 60  # of computing: a busy machine is no fault of the command's
WAITING = 600  # seconds by the clock, of one that waits for what never comes
MEMORY = 4 << 30  # bytes of address space beyond what is in use: a number in a file must not be allocated unseen
LEFTOVERS = (".partial", ".old", ".lock", ".tmp")
_LOCK = re.compile(r"\.tokens/\.[^/]*\.lock$")  # of filelock, which leaves its file: two could hold a removed one


@dataclass
class Outcome:
    status: int | None  # None: an exception escaped, or time ran out
    said: str
    """Standard error."""
    printed: str = ""
    """Standard output."""


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    previous = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_command(name: str, arguments: list[str], folder: Path) -> Outcome:
    """`neuroada NAME ARGUMENTS` in `folder`, as its own process would run it."""
    out, err = io.StringIO(), io.StringIO()
    cwd, argv, environment = Path.cwd(), sys.argv, dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    status: int | None = None
    os.chdir(folder)
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command(name)()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except _TooLong:
        err.write(f"no end within {SECONDS} s of computing, or {WAITING} s of waiting")
    except BaseException:
        err.write(traceback.format_exc())
    finally:
        os.chdir(cwd)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(status, err.getvalue(), out.getvalue())


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder`, and what it is: a file by its content."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            if path.is_symlink():
                what = f"link to {path.readlink()}"
            elif path.is_file():
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                what = "folder" if path.is_dir() else "other"
            found[path.relative_to(folder).as_posix()] = what
    return found


def judge(
    outcome: Outcome, before: dict[str, str], folder: Path, outputs: tuple[str, ...], right: Callable[[], str | None]
) -> str | None:
    """What is wrong with an outcome, or None. `outputs`: paths below `folder` that status 0 may write; `right`: what
    is wrong with the result of status 0."""
    after = snapshot(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    left = [path for path in after if path.endswith(LEFTOVERS) and path not in before and not _LOCK.search(path)]
    if left:
        return f"left behind: {left[0]}"
    outputs = tuple(os.path.normpath(out) for out in outputs)
    new_folders = {path for path in changed if path not in before and after[path] == "folder"}  # an output's parents
    foreign = [
        path
        for path in changed
        if not any(path == out or path.startswith(f"{out}/") for out in outputs)
        and not (path in new_folders and any(out.startswith(f"{path}/") for out in outputs))
    ]
    if foreign:
        return f"touched {foreign[0]}"
    if "SECRET" in outcome.printed or "SECRET" in outcome.said:
        return "told what a link outside of the folder points to"
    if outcome.status == 0:
        return right()
    if outcome.status != 2 or "Traceback" in outcome.said:
        last = [line for line in outcome.said.splitlines() if line.strip()][-1:] or ["nothing"]
        return f"status {outcome.status}: {last[0][:300]}"
    errors = [line for line in outcome.said.splitlines() if "error: " in line]
    if len(errors) != 1 or len(errors[0]) > 1500 or not errors[0].isprintable():
        return f"not one plain line: {errors[:3]}"[:400]
    return None
