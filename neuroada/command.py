"""What every command line of launch/ shares: its exit status, and one line instead of a traceback for a user's mistake."""

import os
import sys
from collections.abc import Callable

from neuroada.errors import Preempted, UserError


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main(argv)` and exit: 0 done, 2 a mistake of the user's, 75 preempted with a checkpoint, 130 interrupted.

    With several ranks the line is printed by rank 0 alone: the others found the same mistake.
    """
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(mistake).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"preempted: {stop}", file=sys.stderr, flush=True)
        sys.exit(75)
    except KeyboardInterrupt:
        sys.exit(130)
