"""validation.json of a run on own data, read."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from neuroada.files import check_schema, read_json


class Sample(BaseModel):
    """An answer to a held-out example."""

    prompt: str
    answer: str
    expected: str


class Measured(BaseModel):
    """The loss on held-out examples after a step (0: before training), and some answers to them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=0)]
    loss: float
    samples: list[Sample] = []


class ValidationFile(BaseModel):
    """The whole file."""

    measured: list[Measured] = []


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Its measurements. UserError: not what a run wrote."""
    found = check_schema(ValidationFile, read_json(path), str(path), "remove it and the checkpoints beside it")
    return found.model_dump()["measured"]
