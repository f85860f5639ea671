"""report.html and the model card of a run."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from neuroada.errors import UserError
from neuroada.files import write_text
from neuroada.registry import METHODS
from neuroada.reporting.card import write_card
from neuroada.reporting.charts import accuracy_chart, column_labels, heat_map, line_chart
from neuroada.reporting.data import data, validation
from neuroada.reporting.deltas import moved
from neuroada.reporting.page import html_table, notes, page, tiles
from neuroada.reporting.published import footnotes, published, published_scores
from neuroada.runs.formatting import format_bytes
from neuroada.runs.run_folder import RunFolder


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html and the README.md beside the trained weights; returns the report.

    From recipe.yaml, metrics.jsonl, run.json, adapter/ or model/, and where they are there results.json and
    base/results.json. UserError if the folder holds no run.
    """
    run = RunFolder.read(folder)
    sections = [("In short", tiles(figures(run)))]
    if run.results or run.recipe["task"]:
        sections.append(("Accuracy", accuracy(run)))
    if run.validation:
        sections.append(("Validation", validation(run)))
    if run.data:
        sections.append(("Data", data(run)))
    if run.metrics:
        sections.append(("Training", curves(run)))
    if weights := where_it_moved(run):
        sections.append(("Where the weights moved", weights))
    sections.append(("Recipe", f"<pre>{escape(run.shown_recipe)}</pre>"))
    if run.metadata:
        sections.append(("Environment", environment(run)))
    subtitle = f"{run.model}, trained on {run.trained_on}"
    text = page(f"{run.method}: {run.trained_on}", subtitle, sections)
    report = folder / "report.html"
    write_text(report, text)
    write_card(run)
    return report


def figures(run: RunFolder) -> list[tuple[str, str, str]]:
    """The key figures: (label, value, what it is of)."""
    found = []
    metadata, metrics = run.metadata, run.metrics
    if metadata:
        share = 100 * metadata["trainable"] / metadata["parameters"]
        of_all = f"{share:.4f} % of {metadata['parameters']:,}"
        found.append(("trainable parameters", f"{metadata['trainable']:,}", of_all))
    if metrics:
        of = f"of {metadata['steps']:,}" if metadata else ""
        found += [
            ("steps", f"{metrics[-1]['step']:,}", of),
            ("loss", f"{metrics[-1]['loss']:.4f}", f"from {metrics[0]['loss']:.4f}"),
            ("tokens per second", f"{median(line['tokens_per_second'] for line in metrics):,.0f}", "median, all ranks"),
            ("peak memory", format_bytes(metrics[-1]["peak_memory_bytes"]), "of rank 0"),
        ]
    if metadata:
        found.append(("ranks", str(metadata["world_size"]), f"{metadata['strategy']}, {metadata['device']}"))
    return found


def curves(run: RunFolder) -> str:
    """Loss, learning rate, tokens per second and memory over steps."""
    steps = [line["step"] for line in run.metrics]

    def column(name: str) -> list[float]:
        return [line[name] for line in run.metrics]

    losses = column("loss")
    span = (min(losses), max(losses))  # by itself: a loss has no use for 0
    charts = [
        line_chart("Loss", run.loss_unit, steps, losses, lambda v: f"{v:.3g}", span=span, noisy=True),
        line_chart("Learning rate", "", steps, column("lr"), lambda v: f"{v:.2g}"),
        line_chart("Tokens", "per second", steps, column("tokens_per_second"), lambda v: f"{v:,.0f}", noisy=True),
        line_chart("Memory", "peak so far, rank 0", steps, column("peak_memory_bytes"), format_bytes),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def accuracy(run: RunFolder) -> str:
    """Each task against the base model and the published table; or how to come by it."""
    if not run.results:
        done = f"neuroada evaluate --adapter RUN/adapter --tasks {run.recipe['task'] or 'A,B'}"
        return notes([f"Not scored yet: {done}, then neuroada report RUN."])
    rows, lines = [], []
    for task, entry in _entries(run.results):
        base = run.base_results.get(task, {}).get("sound", entry.get("frozen_base"))
        stated = published_scores(run).get(task)
        interval = (entry.get("interval") or {}).get("sound")
        rows.append({"task": task, "value": entry["sound"], "interval": interval, "base": base, "published": stated})
        unseen = entry.get("unseen")
        lines.append(
            [
                task,
                f"{entry['n']:,}",
                f"{100 * entry['sound']:.1f}"
                + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else ""),
                f"{100 * entry['published']:.1f}",
                _percent(stated),
                _percent(unseen["sound"] if unseen and unseen["n"] else None),
                f"{unseen['n']:,}" if unseen else "",
                _percent(base),
                f"{100 * entry['baseline']:.1f}",
            ]
        )
    header = ["task", "n", "sound rule", "published rule", "published table", "unseen", "n unseen", "base", "baseline"]
    kept = [i for i, name in enumerate(header) if name in header[:4] or any(line[i] for line in lines)]
    table = html_table([header[i] for i in kept], [[line[i] for i in kept] for line in lines])
    said = ["In %, with the 95 % Wilson interval. Sound rule: the one to believe; published rule: the authors' own, to "
            "compare with their table. Unseen: questions that do not stand in the training set. Baseline: an answer "
            "that ignores the question."]  # fmt: skip
    if not run.base_results and not any(row["base"] is not None for row in rows):
        said.append(
            "The base model has not been scored: neuroada evaluate --model BASE --tasks "
            f"{','.join(run.results)} --out RUN/base"
        )
    if published_scores(run):
        said += [f"Published: {published()['source']}.", *footnotes(run)]
    return accuracy_chart(rows) + table + notes(said)


def _entries(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task's entry, followed by that of its mismatched split if it has one."""
    for task, entry in results.items():
        yield task, entry
        if "mismatched" in entry:
            yield f"{task}, mismatched", entry["mismatched"]


def where_it_moved(run: RunFolder) -> str:
    """Heat maps over layers and projections: RMS of the change, and the change relative to the base weight."""
    method = METHODS.load(run.recipe["adapter"]["method"])
    saved = run.folder / method.folder
    try:
        entries = moved(method, saved, run.base_folder) if saved.is_dir() else []
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:  # tensors of other names and shapes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{saved}: is not what the run's recipe.yaml trains ({reason}); save it again") from error
    if not entries or not any(entry["rms"] for entry in entries):
        return ""
    targets = run.recipe["adapter"]["target_modules"]
    order = targets if isinstance(targets, list) else sorted({entry["projection"] for entry in entries})
    names = {entry["projection"] for entry in entries}
    columns = column_labels(sorted(names, key=lambda name: (order.index(_target(name, order)), name)))
    maps, said = [], []
    for key, title in (("rms", "RMS of the change"), ("relative", "Change relative to the base weight")):
        cells = {(e["layer"], e["projection"]): e[key] for e in entries if e[key] is not None}
        if cells:
            maps.append(heat_map(title, cells, columns))
            (layer, name), value = max(cells.items(), key=lambda item: item[1])
            said.append(f"{title}: largest in layer {layer}, {name} ({value:.3g}).")
    said.append("RMS over the entries that train. Relative: Frobenius norm of the change over that of the weight.")
    return f'<div class="maps">{"".join(maps)}</div>' + notes(said)


def _target(name: str, targets: list[str]) -> str:
    """The recipe's target module that this projection is."""
    return next((target for target in targets if f".{name}".endswith(f".{target}")), targets[-1])


def environment(run: RunFolder) -> str:
    metadata: dict[str, Any] = run.metadata
    lines = [
        [name, str(metadata[name])]
        for name in ("device", "world_size", "strategy", "platform", "python", "code", "started")
    ]
    return html_table(["", ""], [*lines, *([name, version] for name, version in metadata["libraries"].items())])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
