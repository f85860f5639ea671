"""A check: a claim, and a number that must not exceed its limit for the claim to hold."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch


class NotHere(Exception):
    """The check needs what this machine lacks; the text says what."""


@dataclass(frozen=True)
class Place:
    """Where checks run. folder: theirs alone, removed afterwards."""

    device: torch.device
    folder: Path


@dataclass(frozen=True)
class Found:
    """What a check found: its claim holds where value <= limit.

    detail: one line for a reader. numbers: whatever else was measured, by name; bytes and seconds without a factor.
    """

    value: float
    limit: float
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


class Check(ABC):
    """name: for --checks. claim: a sentence that is true or false. number: what the value is."""

    name: str
    claim: str
    number: str

    @abstractmethod
    def run(self, place: Place) -> Found:
        """NotHere where it cannot run. Any other exception is a failure of the claim."""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())


def worst(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves of the same steps, none of them 0."""
    return max(abs(mine / theirs - 1) for mine, theirs in zip(found, expected, strict=True))
