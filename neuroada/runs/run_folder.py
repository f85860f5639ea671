"""A run's folder, read: everything that a report says of the run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from neuroada.config.recipe import read_recipe
from neuroada.errors import UserError
from neuroada.files import check_schema, read_json, read_json_lines
from neuroada.runs.formatting import short, without_paths
from neuroada.runs.metadata import read_metadata
from neuroada.tasks.results_file import read_results
from neuroada.tasks.validation_file import read_measured


@dataclass(frozen=True)
class RunFolder:
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> "RunFolder":
        for name in ("recipe.yaml", "metrics.jsonl"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: has no {name}; give the folder of a training run")
        return cls(folder)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return read_recipe(self.folder / "recipe.yaml").model_dump()

    @property
    def shown_recipe(self) -> str:
        """The recipe as YAML, without the machine's paths."""
        return yaml.safe_dump(without_paths(self.recipe), sort_keys=False)

    @property
    def model(self) -> str:
        return short(self.recipe["model"])

    @property
    def trained_on(self) -> str:
        """The task's name, or "own data"."""
        return self.recipe["task"] or "own data"

    @property
    def method(self) -> str:
        """Such as "NeuroAda, k = 20"."""
        return self.metadata.get("method", self.recipe["adapter"]["method"])

    @property
    def loss_unit(self) -> str:
        return self.metadata.get("loss_unit", "")

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """One entry a logged step."""
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """run.json; empty for a run from before there was one."""
        path = self.folder / "run.json"
        return read_metadata(path) if path.exists() else {}

    @cached_property
    def data(self) -> dict[str, Any]:
        """data.json: what own data came to; empty for a task."""
        path = self.folder / "data.json"
        return check_schema(DataFile, read_json(path), str(path)).model_dump() if path.exists() else {}

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """The measurements of the validation loss on own data: step (0: before training), loss, samples."""
        path = self.folder / "validation.json"
        return read_measured(path) if path.exists() else []

    @cached_property
    def results(self) -> dict[str, Any]:
        """{task: entry of results.json}; empty when the run has not been scored."""
        return _scores(self.folder / "results.json")

    @cached_property
    def base_results(self) -> dict[str, Any]:
        """The same of the base model, from base/results.json in the run's folder."""
        return _scores(self.folder / "base" / "results.json")

    @property
    def base_folder(self) -> Path | None:
        """The base model's files, if they are a local folder."""
        folder = Path(self.recipe["model"])
        return folder if folder.is_dir() else None


Count = Annotated[int, Field(ge=0)]


class SourceCounts(BaseModel):
    """What became of a source's rows."""

    model_config = ConfigDict(strict=True, extra="allow")

    path: str
    format: str
    rows: Count
    sequences: Count
    dropped: dict[str, Count]
    truncated: Count
    split: Count
    skipped: Count


class DataSummary(BaseModel):
    """What the data came to. Lengths are in tokens."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    sources: list[SourceCounts]
    sequences: Count
    tokens: Count
    learnt: Count
    p50: Count
    p95: Count
    longest: Count
    padding: Annotated[float, Field(ge=0, lt=1)]


class DataFile(BaseModel):
    """data.json: a summary, and the first example as pieces of text with whether they are learnt."""

    summary: DataSummary
    examples: list[list[tuple[str, bool]]]


class MetricsLine(BaseModel):
    """A line of metrics.jsonl; its other numbers are for those who read it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    step: Annotated[int, Field(ge=1)]
    loss: float
    lr: float
    tokens_per_second: Annotated[float, Field(ge=0)]
    peak_memory_bytes: Annotated[float, Field(ge=0)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics, without a last line that is torn. UserError where a line is none."""
    lines = read_json_lines(path, limit=1 << 32, torn=True)
    for number, line in enumerate(lines, 1):
        check_schema(MetricsLine, line, f"{path}, line {number}", "remove it, or choose another folder")
    return lines


def _scores(path: Path) -> dict[str, Any]:
    return read_results(path).model_dump()["tasks"] if path.exists() else {}
