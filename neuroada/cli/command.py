"""What every command shares: its exit status, and one line for a user's error instead of a traceback."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from neuroada.errors import Preempted, UserError, node_name


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)` and exit: 0 done, 2 a user's error, 75 preempted with a checkpoint, 130 interrupted."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")  # for tables in a log: without a terminal rich would cut them at 80
    try:
        main(sys.argv[1:])
    except UserError as error:
        _print_error(str(error))
        _leave(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _print_error(f"{error}: free some space and run the same command again")
        _leave(2)
    except Preempted as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM):  # late copies of the request must not change the status
            signal.signal(number, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
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
    if os.environ.get("RANK" if joined else "LOCAL_RANK", "0") != "0":
        return
    place = f"node {node_name()}: " if int(os.environ.get("SLURM_NNODES", "1")) > 1 and not joined else ""
    print(f"error: {place}{' '.join(text.split())}", file=sys.stderr, flush=True)
