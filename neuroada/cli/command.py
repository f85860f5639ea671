"""What every command shares: its exit status, and one line for a user's error instead of a traceback."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from neuroada.environment import check_environment, local_rank, rank
from neuroada.errors import Preempted, UserError, node_name
from neuroada.files.problems import as_user_error


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error instead of the usage before it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for given in args or ():
            if given.startswith("-") and given.endswith("=--"):  # Python 3.11 makes an empty list of this value
                self.error(f"{given}: -- is no value; give another")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)` and exit: 0 done, 2 a user's error, 75 preempted with a checkpoint, 130 interrupted."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")  # for tables in a log: without a terminal rich would cut them at 80
    # PEFT imports it where it is installed, and on CPUs with bf16 it then asks for a kernel of the hub's.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        check_environment()
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _print_error(str(error))
        _leave(2)
    except BrokenPipeError:  # `| head` has read enough; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(141)
    except OSError as error:
        _print_error(str(as_user_error(error, str(error.filename or "a file or folder"))))
        _leave(2)
    except MemoryError as error:
        _print_error(f"out of memory ({error}); use a machine with more, or smaller batches")
        _leave(2)
    except Preempted as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM):  # late copies of the request must not change the status
            signal.signal(number, signal.SIG_IGN)
        if rank() == 0:
            print(f"preempted: {stop}", file=sys.stderr, flush=True)
        _leave(75)
    except KeyboardInterrupt:
        _leave(130)
    _leave(0)


def _leave(status: int) -> NoReturn:
    """Exit. Of joined ranks without Python's tidying up: there torch's threads of gloo abort now and then (status 134,
    "terminate called without an active exception"), and `destroy_process_group` may wait for a rank that is gone.
    """
    if not _joined():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _joined() -> bool:
    """Whether this process is a rank of a torch process group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _print_error(text: str) -> None:
    """One line. Of joined ranks, who met the same error, rank 0 tells it; before, each node tells its own."""
    joined = _joined()
    nodes = os.environ.get("SLURM_NNODES", "1")
    with suppress(ValueError):  # an odd variable is itself the error to tell
        if (rank() if joined else local_rank()) != 0:
            return
    place = f"node {node_name()}: " if nodes.isdecimal() and nodes != "1" and not joined else ""
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    line = line if len(line) <= 1000 else f"{line[:700]} ... {line[-290:]}"
    print(f"error: {place}{line}", file=sys.stderr, flush=True)
