"""A comparison of methods: from the result.json of its runs to comparison.json, a table and report.html."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich.table import Table

from neuroada.comparison.files import read_result
from neuroada.runs.formatting import format_bytes, short


def folder_of(method: str) -> str:
    """The folder's name for a method as it was given, such as neuroada:k=20."""
    return re.sub(r"[^\w.=]+", "-", method)


def summarize(
    out: Path, chosen: dict[str, Any], seeds: Sequence[int], *, task: str, model: str, command: str
) -> dict[str, Any]:
    """One row a method over its seeds at the rate chosen for it; the base model's row first.

    `chosen`: {label: {"lr", "tries": {rate: what it was chosen by, lower is better; None: diverged}}}.
    A row's "losses" are the held-out ones, in the order of its "seeds"; "difference" is those less the first method's,
    seed by seed: a seed draws the order of the data (of a classifier also its start and the split) for every method
    alike, and that part of the spread cancels.
    """
    results = {
        file.parent.relative_to(out / "runs").as_posix(): read_result(file)
        for file in sorted((out / "runs").rglob("result.json"))
    }
    base = results.get("base", {})
    rows: list[dict[str, Any]] = []
    losses: list[dict[int, float]] = []  # of each method on what is held out, by seed
    for label, choice in chosen.items():
        runs = [
            result
            for name, result in results.items()
            if name != "base"
            and _is(result, name, label, choice["lr"])
            and result["recipe"]["train"].get("seed") in seeds
        ]
        ended = [result for result in runs if "diverged" not in result]
        measured = [result for result in ended if result.get("test") is not None]
        losses.append({result["recipe"]["train"]["seed"]: result["test"] for result in measured})
        shared = losses[0].keys() & losses[-1].keys()
        rows.append(
            {
                "method": label,
                **choice,
                "at_the_edge": _at_the_edge(choice),
                "seeds": list(losses[-1]),
                "diverged": len(runs) - len(ended),
                "losses": [*losses[-1].values()],
                "test": _spread([*losses[-1].values()]),
                "difference": _spread([losses[-1][seed] - losses[0][seed] for seed in shared]) if rows else None,
                "accuracy": _accuracies(ended),
                **_forgetting(base, ended),
                **{key: _spread([result.get(key) for result in ended]) for key in COSTS},
                "trainable": ended[0].get("trainable") if ended else None,
                "parameters": ended[0].get("parameters") if ended else None,
            }
        )
    return {
        "task": task,
        "model": short(model),
        "command": command,
        "device": next((r["device"] for r in results.values() if "device" in r), None),
        "base": {
            "test": base.get("test"),
            "accuracy": _accuracies([base]) if base else {},
            **({"general_text": base["general_text"]} if "general_text" in base else {}),
        },
        "rows": rows,
    }


COSTS = ("step_seconds", "peak_memory_bytes", "saved_bytes", "merged_cost")


def _is(result: dict[str, Any], name: str, label: str, lr: float) -> bool:
    rate = (result["recipe"].get("optimizer") or {}).get("lr")  # the base has none
    return name.split("/")[0] == folder_of(label) and rate == lr


def _at_the_edge(choice: dict[str, Any]) -> bool:
    """Whether the best rate is the lowest or highest of several tried: the best may lie beyond."""
    rates = sorted(float(rate) for rate in choice["tries"])
    return len(rates) > 1 and any(math.isclose(choice["lr"], rate) for rate in (rates[0], rates[-1]))


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and sample standard deviation of the values that exist; None without any."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {"mean": mean(found), "deviation": stdev(found) if len(found) > 1 else 0.0, "n": len(found)}


def _accuracies(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each task the runs were scored on, by the sound rule."""
    names = dict.fromkeys(name for result in results for name in result.get("tasks", {}))
    return {name: _spread([result["tasks"][name]["sound"] for result in results]) for name in names}


def _forgetting(base: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The loss on general text, and how far it is above the untrained model's; {} where that was not measured."""
    if "general_text" not in base:
        return {}
    losses = [result["general_text"]["loss"] for result in results if "general_text" in result]
    before = base["general_text"]["loss"]
    return {"general_text": _spread(losses), "forgetting": _spread([loss - before for loss in losses])}


def cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table as text: its header, and a row for the base and for each method; without columns that nothing fills."""
    tasks = list(dict.fromkeys(name for row in [summary["base"], *summary["rows"]] for name in row["accuracy"]))
    header = [
        "method",
        "trainable",
        "rate",
        "seeds",
        "held-out loss",
        f"less {summary['rows'][0]['method']}'s",
        *tasks,
        "general text",
        "forgetting",
        "step",
        "peak memory",
        "saved",
        "merged cost",
    ]
    base = summary["base"]
    lines = []
    general = base.get("general_text")
    if base["test"] is not None or base["accuracy"] or general:
        loss = "" if base["test"] is None else f"{base['test']:.4f}"
        scores = [_percent(base["accuracy"].get(name)) for name in tasks]
        before = f"{general['loss']:.4f}" if general else ""
        lines.append(["base, untrained", "0", "", "", loss, "", *scores, before, "", "", "", "", ""])
    for row in summary["rows"]:
        lines.append(
            [
                row["method"],
                f"{row['trainable']:,}" if row["trainable"] else "",
                f"{row['lr']:g}" + ("*" if row["at_the_edge"] else ""),
                f"{len(row['seeds'])}" + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
                _with_spread(row["test"], 4),
                _with_spread(row["difference"], 4, "+"),
                *(_percent(row["accuracy"].get(name)) for name in tasks),
                _with_spread(row.get("general_text"), 4),
                _with_spread(row.get("forgetting"), 4, "+"),
                _with_spread(row["step_seconds"], 2) + (" s" if row["step_seconds"] else ""),
                format_bytes(row["peak_memory_bytes"]["mean"]) if row["peak_memory_bytes"] else "",
                format_bytes(row["saved_bytes"]["mean"]) if row["saved_bytes"] else "",
                _with_spread(row["merged_cost"], 2) + (" x" if row["merged_cost"] else ""),
            ]
        )
    filled = [column for column in range(len(header)) if any(line[column] for line in lines)]
    return [header[column] for column in filled], [[line[column] for column in filled] for line in lines]


def _with_spread(value: dict[str, float] | None, decimals: int, sign: Literal["", "+"] = "") -> str:
    if value is None:
        return ""
    told = f"{value['mean']:{sign}.{decimals}f}"
    return told + (f" ± {value['deviation']:.{decimals}f}" if value["n"] > 1 else "")


def _percent(value: dict[str, float] | None) -> str:
    return _with_spread(value and {**value, "mean": 100 * value["mean"], "deviation": 100 * value["deviation"]}, 1)


def notes(summary: dict[str, Any]) -> list[str]:
    """What the reader of the table must know beside it."""
    held_out = (
        "nats per answer token (of a classifier: per text) of questions no run saw, nor was a learning rate chosen by "
        "them"
    )
    if "validation_loss" in summary:
        held_out = (
            f"{summary['validation_loss']}, of validation examples that no run trained on, but by which its rate and "
            f"the step it saved were chosen; they are drawn by the seed, unless they have a file of their own"
        )
    said = [
        f"Mean ± standard deviation over seeds. Held-out loss: {held_out}. Accuracy in %. Merged cost: a forward pass "
        f"after merging, as a multiple of the base model's.",
        "Less the first method's: the difference of the losses, seed by seed; below 0 is better than the first method.",
    ]
    if "matched" in summary:
        said.append(
            f"Sizes set to train nearest to {summary['matched']}: k, rank or sparsity, beside the method's name; a "
            f"method without one has no size of its own."
        )
    if general := summary["base"].get("general_text"):
        said.append(
            f"General text: nats per token of {general['tokens']:,} tokens of a text that is not the task's. "
            f"Forgetting: that less the untrained base's; above 0, training made the model worse at it."
        )
    if any(row["at_the_edge"] for row in summary["rows"]):
        said.append("* the best of the rates tried is the lowest or the highest: a better one may lie beyond.")
    return said


def table(summary: dict[str, Any]) -> Table:
    header, lines = cells(summary)
    view = Table(title=f"{summary['task']}, {summary['model']}", caption=" ".join(notes(summary)))
    for name in header:
        view.add_column(name, justify="left" if name == "method" else "right")
    for line in lines:
        view.add_row(*line)
    return view
