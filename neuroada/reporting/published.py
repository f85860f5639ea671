"""The published table: which of its rows a run is to be compared with."""

from functools import cache
from pathlib import Path
from typing import Any

from neuroada.files import read_json
from neuroada.runs.run_folder import RunFolder

PUBLISHED_NAMES = {
    "yahma/llama-7b-hf": "llama-7b",
    "yahma/llama-13b-hf": "llama-13b",
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
}

PUBLISHED_METHOD = "neuroada"


@cache
def published() -> dict[str, Any]:
    """The table, its source and its footnotes."""
    return read_json(Path(__file__).with_name("published.json"))


def published_scores(run: RunFolder) -> dict[str, float]:
    """{task: published accuracy, 0..1} of this model at this k; empty where nothing was published."""
    adapter, name = run.recipe["adapter"], PUBLISHED_NAMES.get(run.recipe["model"])
    if adapter.get("neuron_fraction", 1.0) < 1:
        return {}
    wanted = (name, PUBLISHED_METHOD, "magnitude", adapter["k"])
    own = (adapter["method"], adapter["selection"])
    rows = [row for row in published()["rows"] if (row["model"], *own, row["k"]) == wanted]
    return {task: score / 100 for row in rows for task, score in row["scores"].items()}


def footnotes(run: RunFolder) -> list[str]:
    """What must be known of the published row of this model and k, as far as its suite was scored."""
    name, k = PUBLISHED_NAMES.get(run.recipe["model"]), run.recipe["adapter"]["k"]
    found = [note for note in published()["footnotes"] if note["model"] == name and k in note["k"]]
    return [note["text"] for note in found if not run.results.keys().isdisjoint(note["tasks"])]
