"""results.json, read: the scores of a model, by task."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from neuroada.files import check_schema, read_json

Share = Annotated[float, Field(ge=-1, le=1)]


class Unseen(BaseModel):
    """Of the questions that are not in the training set."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    n: Annotated[int, Field(ge=0)]
    published: Share | None
    sound: Share | None


class Entry(BaseModel):
    """One task's scores in results.json."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    n: Annotated[int, Field(ge=0)]
    published: Share
    sound: Share
    baseline: Share
    interval: dict[str, Annotated[list[Share], Field(min_length=2, max_length=2)] | None] | None = None
    unseen: Unseen | None = None
    frozen_base: Share | None = None
    too_long: Annotated[int, Field(ge=0)] = 0


class Results(BaseModel):
    """results.json."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = ""
    adapter: str | None = None
    weights: str | None = None
    tasks: dict[str, Entry]


def read_results(path: Path) -> Results:
    """UserError: missing, or not what an evaluation wrote."""
    remedy = "remove it, or give another --out"
    return check_schema(Results, read_json(path, remedy=remedy), str(path), remedy)
