"""A run's folder, read: everything that a report says of the run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from neuroada.errors import UserError
from neuroada.files import read_json, read_json_lines, read_yaml
from neuroada.runs.formatting import short, without_paths


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
        return read_yaml(self.folder / "recipe.yaml")

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
        return read_json_lines(self.folder / "metrics.jsonl", torn=True)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """run.json; empty for a run from before there was one."""
        return _json(self.folder / "run.json") or {}

    @cached_property
    def data(self) -> dict[str, Any]:
        """data.json: what own data came to; empty for a task."""
        return _json(self.folder / "data.json") or {}

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """The measurements of the validation loss on own data: step, loss, samples."""
        return (_json(self.folder / "validation.json") or {}).get("measured", [])

    @cached_property
    def results(self) -> dict[str, Any]:
        """{task: entry of results.json}; empty when the run has not been scored."""
        return (_json(self.folder / "results.json") or {}).get("tasks", {})

    @cached_property
    def base_results(self) -> dict[str, Any]:
        """The same of the base model, from base/results.json in the run's folder."""
        return (_json(self.folder / "base" / "results.json") or {}).get("tasks", {})

    @property
    def base_folder(self) -> Path | None:
        """The base model's files, if they are a local folder."""
        folder = Path(self.recipe["model"])
        return folder if folder.is_dir() else None


def _json(file: Path) -> Any:
    return read_json(file) if file.is_file() else None
