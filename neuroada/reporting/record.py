"""Everything a report tells of a run, read from the run's folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from neuroada.errors import UserError
from neuroada.reporting.words import short, without_paths

PUBLISHED_NAMES = {
    "yahma/llama-7b-hf": "llama-7b",
    "yahma/llama-13b-hf": "llama-13b",
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
}


@dataclass(frozen=True)
class Record:
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> "Record":
        for name in ("recipe.yaml", "metrics.jsonl"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: has no {name}; give the folder of a run of launch/train.py")
        return cls(folder)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "recipe.yaml").read_text())

    @property
    def shown_recipe(self) -> str:
        """The recipe as YAML, without the machine's paths."""
        return yaml.safe_dump(without_paths(self.recipe), sort_keys=False)

    @property
    def model(self) -> str:
        return short(self.recipe["model"])

    @property
    def method(self) -> str:
        """Such as "NeuroAda, k = 20"."""
        adapter = self.recipe["adapter"]
        budget = {
            "neuroada": f"NeuroAda, k = {adapter['k']}",
            "masked": f"masked tuning, k = {adapter['k']}",
            "lora": f"LoRA, rank {adapter['rank']}",
            "shira": f"SHiRA, rank {adapter['rank']}",
            "supertuning": f"Super-Tuning, sparsity {adapter.get('sparsity')}",
            "full": "full fine-tuning",
            "head": "classifier alone",
        }[adapter["method"]]
        selected = adapter["method"] in ("neuroada", "masked") and adapter["selection"] != "magnitude"
        return f"{budget}, {adapter['selection']} selection" if selected else budget

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """One entry a logged step."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines() if line]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """run.json; empty for a run from before there was one."""
        return _json(self.folder / "run.json") or {}

    @cached_property
    def results(self) -> dict[str, Any]:
        """{task: entry of results.json}; empty when the run has not been scored."""
        return (_json(self.folder / "results.json") or {}).get("tasks", {})

    @cached_property
    def base_results(self) -> dict[str, Any]:
        """The same of the base model, from base/results.json in the run's folder."""
        return (_json(self.folder / "base" / "results.json") or {}).get("tasks", {})

    @cached_property
    def published(self) -> dict[str, float]:
        """{task: published accuracy, 0..1} of this model at this k; empty where nothing was published."""
        adapter, name = self.recipe["adapter"], PUBLISHED_NAMES.get(self.recipe["model"])
        if adapter["method"] != "neuroada" or adapter["selection"] != "magnitude":
            return {}
        rows = [row for row in published()["rows"] if row["model"] == name and row["k"] == adapter["k"]]
        return {task: score / 100 for row in rows for task, score in row["scores"].items()}

    @property
    def footnotes(self) -> list[str]:
        """What must be known of the published row of this model and k, as far as its suite was scored."""
        name, k = PUBLISHED_NAMES.get(self.recipe["model"]), self.recipe["adapter"]["k"]
        found = [note for note in published()["footnotes"] if note["model"] == name and k in note["k"]]
        return [note["text"] for note in found if not self.results.keys().isdisjoint(note["tasks"])]

    @property
    def base_folder(self) -> Path | None:
        """The base model's files, if they are a local folder."""
        folder = Path(self.recipe["model"])
        return folder if folder.is_dir() else None


def published() -> dict[str, Any]:
    """The published table, its source and its footnotes."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None
