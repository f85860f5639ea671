"""report.html and the model card of a run."""

from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from neuroada.reporting.card import write_card
from neuroada.reporting.charts import accuracy_chart, column_labels, heat_map, line_chart
from neuroada.reporting.deltas import moved
from neuroada.reporting.page import html_table, notes, page, tiles
from neuroada.reporting.record import Record, published
from neuroada.reporting.words import size


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html and the README.md beside the trained weights; returns the report.

    From recipe.yaml, metrics.jsonl, run.json, adapter/ or model/, and where they are there results.json and
    base/results.json. UserError if the folder holds no run.
    """
    record = Record.read(folder)
    sections = [("In short", tiles(figures(record)))]
    sections.append(("Accuracy", accuracy(record)))
    if record.metrics:
        sections.append(("Training", curves(record)))
    if weights := where_it_moved(record):
        sections.append(("Where the weights moved", weights))
    sections.append(("Recipe", f"<pre>{escape(record.shown_recipe)}</pre>"))
    if record.facts:
        sections.append(("Environment", environment(record)))
    subtitle = f"{record.model}, trained on {record.recipe['task']}"
    text = page(f"{record.method}: {record.recipe['task']}", subtitle, sections)
    partial, report = folder / ".report.html.partial", folder / "report.html"
    partial.write_text(text, encoding="utf-8")
    partial.replace(report)
    write_card(record)
    return report


def figures(record: Record) -> list[tuple[str, str, str]]:
    """The key figures: (label, value, what it is of)."""
    found = []
    facts, metrics = record.facts, record.metrics
    if facts:
        share = 100 * facts["trainable"] / facts["parameters"]
        found.append(("trained", f"{facts['trainable']:,}", f"{share:.4f} % of {facts['parameters']:,}"))
    if metrics:
        of = f"of {facts['steps']:,}" if facts else ""
        found += [
            ("steps", f"{metrics[-1]['step']:,}", of),
            ("loss", f"{metrics[-1]['loss']:.4f}", f"from {metrics[0]['loss']:.4f}"),
            ("tokens per second", f"{median(line['tokens_per_second'] for line in metrics):,.0f}", "median, all ranks"),
            ("peak memory", size(metrics[-1]["peak_memory_bytes"]), "of rank 0"),
        ]
    if facts:
        found.append(("ranks", str(facts["world_size"]), f"{facts['strategy']}, {facts['device']}"))
    return found


def curves(record: Record) -> str:
    """Loss, learning rate, tokens per second and memory over steps."""
    steps = [line["step"] for line in record.metrics]

    def column(name: str) -> list[float]:
        return [line[name] for line in record.metrics]

    losses = column("loss")
    span = (min(losses), max(losses))  # by itself: a loss has no use for 0
    charts = [
        line_chart("Loss", "nats per answer token", steps, losses, lambda v: f"{v:.3g}", span=span, noisy=True),
        line_chart("Learning rate", "", steps, column("lr"), lambda v: f"{v:.2g}"),
        line_chart("Tokens", "per second", steps, column("tokens_per_second"), lambda v: f"{v:,.0f}", noisy=True),
        line_chart("Memory", "peak so far, rank 0", steps, column("peak_memory_bytes"), size),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def accuracy(record: Record) -> str:
    """Each task against the base model and the published table; or how to come by it."""
    if not record.results:
        done = f"python launch/evaluate.py --adapter RUN/adapter --tasks {record.recipe['task']}"
        return notes([f"Not scored yet: {done}, then python launch/report.py RUN."])
    rows, lines = [], []
    for task, entry in record.results.items():
        base = record.base_results.get(task, {}).get("sound", entry.get("frozen_base"))
        stated = record.published.get(task)
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
    if not record.base_results and not any(row["base"] is not None for row in rows):
        said.append(
            "The base model has not been scored: python launch/evaluate.py --model BASE --tasks "
            f"{','.join(record.results)} --out RUN/base"
        )
    if record.published:
        said += [f"Published: {published()['source']}.", *record.footnotes]
    return accuracy_chart(rows) + table + notes(said)


def where_it_moved(record: Record) -> str:
    """Heat maps over layers and projections: RMS of the change, and the change relative to the base weight."""
    entries = moved(record.folder, record.base_folder)
    if not entries or not any(entry["rms"] for entry in entries):
        return ""
    order = record.recipe["adapter"]["target_modules"]
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


def environment(record: Record) -> str:
    facts: dict[str, Any] = record.facts
    lines = [
        [name, str(facts[name])]
        for name in ("device", "world_size", "strategy", "platform", "python", "code", "started")
    ]
    return html_table(["", ""], [*lines, *([name, version] for name, version in facts["libraries"].items())])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
