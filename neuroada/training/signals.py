"""Being asked to stop: SLURM's SIGUSR1 before the time limit, SIGTERM from anybody."""

from __future__ import annotations

import os
import signal
import threading
import time
from io import RawIOBase
from typing import TYPE_CHECKING

from neuroada.errors import Preempted

if TYPE_CHECKING:
    from neuroada.engines import Engine

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
ECHO_SECONDS = 2.0
"""SLURM, srun, the batch script and launchers all pass a signal on: copies that arrive within this time are one."""


class StopRequest:
    """Remembers a first SIGUSR1 or SIGTERM; a second one, more than ECHO_SECONDS later, ends the process at once.

    Whatever rank the first one reaches, all ranks agree on it at the next step boundary. The second one ends this rank
    with status 128 + its number even inside a collective call that never returns: a thread of its own receives it,
    because Python runs signal handlers only when the main thread is back from such a call. A checkpoint that is being
    written at that moment has only its temporary name: the newest whole one stays.

    Make it in the main thread, early: before it exists either signal just ends the process. A `with` block gives the
    process its own handlers back, but for a block that Preempted leaves: late copies must not change the exit status.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None  # time.monotonic() of the first signal
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # The wake-up pipe tells the thread.
        self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(read,), name="stop request", daemon=True).start()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, Preempted):
            self.close()

    def close(self) -> None:
        """Listen no more. A forked child would otherwise survive the SIGTERM that ends it."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread

    def _listen(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb", buffering=0) as told:
            self._hear(told)

    def _hear(self, told: RawIOBase) -> None:
        while received := told.read(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if self.asked_at is None:
                self.asked_at = time.monotonic()
            elif time.monotonic() - self.asked_at > ECHO_SECONDS:
                os._exit(128 + number)

    def agreed(self, engine: Engine) -> bool:
        """Whether any rank has been asked. Collective: one number is reduced."""
        import torch

        asked = torch.tensor([float(self.asked_at is not None)], device=engine.device)
        return bool(engine.reduce(asked).item())
