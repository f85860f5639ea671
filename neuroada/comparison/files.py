"""The files of a comparison, read: comparison.json, and the result.json of a run."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from neuroada.files import check_schema, read_json

REMEDY = "remove its folder, and run the comparison again"
Number = Annotated[float, Field(ge=-1e30, le=1e30)]  # a sum or a square of some stays finite
Rate = Annotated[str, Field(pattern=r"^\d{1,20}(\.\d{1,20})?(e[-+]?\d{1,2})?$")]
"""A learning rate as a key, such as 0.003 or 1e-05."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Score(_File):
    """A task's accuracy."""

    sound: Number


class GeneralLoss(_File):
    """What a model loses on general text, nats per token, and of how many tokens."""

    loss: Number
    tokens: Annotated[int, Field(ge=1)]


class Seed(_File):
    """A recipe's train section."""

    seed: int | None = None


class Optimizer(_File):
    """A recipe's optimizer section."""

    lr: Number | None = None


class Asked(_File):
    """The recipe of a run: the fields that a table asks for."""

    train: Seed
    optimizer: Optimizer | None = None


class Result(_File):
    """result.json: what was measured of one run. Of a run that diverged: its recipe, and how."""

    recipe: Asked
    diverged: str = ""
    validation: Number | None = None
    test: Number | None = None
    tasks: dict[str, Score] = {}
    general_text: GeneralLoss | None = None
    step_seconds: Number | None = None
    peak_memory_bytes: Number | None = None
    saved_bytes: Number | None = None
    merged_cost: Number | None = None
    trainable: int | None = None
    parameters: int | None = None
    device: str | None = None


class Spread(_File):
    """Mean and standard deviation of `n` runs."""

    mean: Number
    deviation: Number
    n: Annotated[int, Field(ge=1)]


class Row(_File):
    """A method over its seeds."""

    method: str
    lr: Number
    tries: dict[Rate, Number | None]
    at_the_edge: bool
    seeds: list[int]
    diverged: int
    test: Spread | None
    difference: Spread | None
    accuracy: dict[str, Spread | None]
    general_text: Spread | None = None
    forgetting: Spread | None = None
    step_seconds: Spread | None
    peak_memory_bytes: Spread | None
    saved_bytes: Spread | None
    merged_cost: Spread | None
    trainable: int | None


class Base(_File):
    """The untrained model."""

    test: Number | None
    accuracy: dict[str, Spread | None]
    general_text: GeneralLoss | None = None


class Summary(_File):
    """comparison.json: the whole table. validation_loss: of own data, what its loss is measured in."""

    task: str
    model: str
    command: str
    validation_loss: str = ""
    device: str | None
    base: Base
    rows: Annotated[list[Row], Field(min_length=1)]


def read_result(path: Path) -> dict[str, Any]:
    """result.json of a run. UserError: not what a comparison wrote."""
    return check_schema(Result, read_json(path), str(path), REMEDY).model_dump(exclude_unset=True)


def read_summary(path: Path) -> dict[str, Any]:
    """comparison.json. UserError: not what a comparison wrote."""
    return check_schema(Summary, read_json(path), str(path), "run the comparison again").model_dump(exclude_unset=True)
