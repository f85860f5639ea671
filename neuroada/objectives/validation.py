"""The interface of what scores a model as it trains, and the parts that its kinds share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from neuroada.engines import Engine
from neuroada.engines.collectives import gather, together


class Validation(Protocol):
    """Scores the model between steps, and knows when it was best: that state is what a run saves."""

    def resume(self, first: int) -> None:
        """Take up what was found in the run's folder up to step `first`. Collective."""

    def due(self, step: int, steps: int) -> bool:
        """Whether the model is to be scored after step `step` (from 1) of `steps`."""

    def improved(self, model: nn.Module, step: int) -> bool:
        """Score the model; whether it is the best so far. Collective."""

    def record(self) -> None:
        """Write what is known, once the best state is saved."""

    def exhausted(self) -> bool:
        """Whether training is to end now, because the model no longer gets better. The same on every rank."""

    def finish(self, saved: Path) -> None:
        """Write results.json, of what the folder `saved` holds, and print it."""


def known_up_to(
    first: int, file: Path, read: Callable[[Path], list[dict[str, Any]]], engine: Engine
) -> list[dict[str, Any]]:
    """The entries that `read` finds in `file` of steps up to `first`; rank 0's, on every rank. Collective."""
    found: list[dict[str, Any]] = []
    with together(engine):
        if engine.rank == 0 and file.is_file():
            found = read(file)
    return [entry for entry in gather(engine, found)[0] if entry["step"] <= first]


def ends_epoch(step: int, steps: int, batch: int, examples: int) -> bool:
    """Whether an epoch of so many examples, or the run, ends with step `step` (from 1) of `steps`."""
    return step == steps or step * batch // examples > (step - 1) * batch // examples
