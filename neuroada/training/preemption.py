"""Being asked to stop: SLURM's SIGUSR1 before the time limit, SIGTERM from anybody."""

import os
import signal
from types import FrameType

import torch

from neuroada.training.engines import Engine


class StopRequest:
    """Remembers a first SIGUSR1 or SIGTERM; a second one ends the process at once.

    Whatever rank it reaches, all ranks agree on it at the next step boundary. A checkpoint that is being written when
    the second signal comes has only its temporary name: the newest whole one stays.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def agreed(self, engine: Engine) -> bool:
        """Whether any rank has been asked. Collective."""
        return bool(engine.reduce(torch.tensor([float(self.asked)], device=engine.device)).item())
