"""From scored predictions to results.json and the table that is printed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from neuroada.errors import UserError
from neuroada.tasks.results_file import read_results
from neuroada.tasks.statistics import RULES, wilson
from neuroada.tasks.table import Task

Prediction = Mapping[str, Any]  # a line of predictions/<task>.jsonl


def summarize(task: Task, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """One task's entry in results.json. `unseen` is None where it is not known what the model was trained on."""
    known = all(p["seen_in_training"] is not None for p in predictions)
    return {
        **_accuracies(predictions),
        "unseen": _accuracies([p for p in predictions if not p["seen_in_training"]]) if known else None,
        "baseline": _baseline(task, predictions),
        "too_long": sum("note" in p for p in predictions),
        **({} if task.version is None else {"version": task.version}),
    }


def _baseline(task: Task, predictions: Sequence[Prediction]) -> float:
    if task.multiple_choice is not None:  # to draw an option
        return sum(1 / len(p["options"]) for p in predictions) / len(predictions)
    return task.baseline([p["gold"] for p in predictions])


def _accuracies(predictions: Sequence[Prediction]) -> dict[str, Any]:
    n = len(predictions)
    right = {rule: sum(p[rule]["correct"] for p in predictions) for rule in RULES}
    return {
        "n": n,
        **{rule: right[rule] / n if n else None for rule in RULES},
        "interval": {rule: wilson(right[rule], n) if n else None for rule in RULES},
    }


def averages(tasks: Sequence[Task], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each suite with several of its tests here, the plain mean over them (as published tables have it)."""
    means = {}
    for suite in dict.fromkeys(task.suite for task in tasks):
        rows = [entries[task.name] for task in tasks if task.suite == suite and task.tests_its_suite]
        if len(rows) > 1:
            means[suite] = {
                "n": sum(row["n"] for row in rows),
                **{key: sum(row[key] for row in rows) / len(rows) for key in (*RULES, "baseline")},
            }
    return means


def read_scores(out: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks in `out`/results.json that an evaluation of the same model adds to; {} where there are none.

    header: "model", "adapter" and "weights" of the new evaluation. Scores of weights that the same names stood for
    before are left out. UserError: scores of another model.
    """
    path = out / "results.json"
    if not path.exists():
        return {}
    there = read_results(path)
    if (there.model, there.adapter) != (header["model"], header["adapter"]):
        raise UserError(
            f"--out {out}: holds the scores of {there.adapter or there.model}; give another folder, or remove them"
        )
    if there.weights != header["weights"]:
        return {}
    return {name: entry.model_dump(exclude_unset=True) for name, entry in there.tasks.items()}


def kept_scores(out: Path, header: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """`read_scores`, less those of a file or a library's version that bore the name of one of `tasks` before."""
    versions = {task.name: task.version for task in tasks}
    return {
        name: entry
        for name, entry in read_scores(out, header).items()
        if name not in versions or entry.get("version") == versions[name]
    }


def check_smaller(out: Path, kept: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """UserError where a score of more questions would be lost. sizes: task -> the questions of the new score."""
    for name, n in sizes.items():
        if name in kept and kept[name]["n"] > n:
            raise UserError(
                f"--limit: {out / 'results.json'} holds {name}'s score of {kept[name]['n']} questions, more than the "
                f"{n} asked for; give another --out"
            )


def make_header(names: Mapping[str, str | None], identity: Any, limit: int | None) -> dict[str, Any]:
    """What results.json says of the model: its names, and a checksum of `identity`, which changes with the weights."""
    weights = None if identity is None else hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return {**names, "weights": weights, "limit": limit}


def to_json(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False) + "\n"


def table(results: Mapping[str, Any]) -> Table:
    """Accuracies in %, with the 95 % interval; unseen = the questions that are not in the training set."""
    view = Table(title=results["adapter"] or results["model"], caption="accuracy in %, with its 95 % interval")
    view.add_column("task")
    for column in ("n", "published", "sound", "unseen n", "unseen sound", "baseline"):
        view.add_column(column, justify="right")
    for name, row in results["tasks"].items():
        unseen = row["unseen"]
        view.add_row(
            name,
            f"{row['n']:,}",
            _percent(row, "published"),
            _percent(row, "sound"),
            f"{unseen['n']:,}" if unseen else "unknown",
            _percent(unseen, "sound") if unseen else "",
            f"{100 * row['baseline']:.1f}",
        )
    for suite, row in results["averages"].items():
        cells = (f"{100 * row[key]:.1f}" for key in (*RULES, "baseline"))
        published, sound, baseline = cells
        view.add_row(f"average, {suite}", f"{row['n']:,}", published, sound, "", "", baseline, style="bold")
    return view


def _percent(row: Mapping[str, Any], rule: str) -> str:
    if not row["n"]:
        return ""
    low, high = row["interval"][rule]
    return f"{100 * row[rule]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the reader of the table must know beside it."""
    return [
        f"{name}: {row['too_long']} of {row['n']} prompts do not fit the model's context; counted as wrong"
        for name, row in results["tasks"].items()
        if row.get("too_long")
    ]
