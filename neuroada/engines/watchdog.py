"""An end to endless waiting: a collective call whose other side is gone may never return by itself."""

import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta

from neuroada.errors import node_name

EXIT_STATUS = 124  # as of timeout(1)


class Watchdog:
    """Ends this process when what it watches takes longer than `minutes`, and says which rank waited where.

    The time is counted in short ticks of a thread, so that a job which SLURM suspends and continues is not blamed.
    """

    def __init__(self, minutes: float, rank: int) -> None:
        self.minutes, self.rank = minutes, rank
        self.watched: str | None = None
        self.ticks = 0
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def watch(self, what: str | None) -> None:
        """Start the clock anew, for `what` ("step 17"); None: nothing is watched."""
        self.watched, self.ticks = what, 0

    def _run(self) -> None:
        limit = 60 * self.minutes
        tick = min(1.0, limit / 10)
        while True:
            time.sleep(tick)
            self.ticks += 1
            if self.watched is not None and self.ticks * tick > limit:
                self._bark()

    def _bark(self) -> None:
        print(
            f"error: node {node_name()}, rank {self.rank}: {self.watched} has not ended within "
            f"train.step_timeout_minutes = {self.minutes:g}: another rank is gone or hangs (look for one that does not "
            f"report, or waits elsewhere), or the limit is too short; this rank waits here:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()  # of every thread, the main one last; also where Python itself is stuck in a call
        os._exit(EXIT_STATUS)


def collective_timeout(minutes: float) -> timedelta:
    """For process groups: a little longer than the watchdog, which says more when it ends the job."""
    return timedelta(minutes=minutes + 1)
