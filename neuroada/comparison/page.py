"""report.html of a comparison: the table, the curves of the chosen runs, the rates that were tried."""

import re
from html import escape
from pathlib import Path
from typing import Any

from neuroada.comparison.summary import cells, folder_of, notes
from neuroada.files import write_json, write_text
from neuroada.reporting.charts import line_chart
from neuroada.reporting.page import html_table, page
from neuroada.reporting.page import notes as paragraphs
from neuroada.runs.run_folder import read_metrics


def comparison_page(out: Path, summary: dict[str, Any]) -> str:
    """The page of a comparison whose runs lie in `out`/runs."""
    header, lines = cells(summary)
    command = re.sub(r"(?<=[= ])/\S*/", "", summary["command"])  # no path of this machine; comparison.json has it whole
    machine = [f"Device: {summary['device']}."] if summary["device"] else []
    unit = summary.get("validation_loss", "nats per answer token")
    sections = [
        ("Result", interval_chart(summary) + html_table(header, lines) + paragraphs([*notes(summary), *machine])),
        ("Learning rates tried", rates(summary)),
        (f"Training loss at the chosen rate, first seed, in {unit}", curves(out, summary)),
        ("Run it again", f"<pre>{escape(command)}</pre>"),
    ]
    return page(f"Methods compared on {summary['task']}", summary["model"], [part for part in sections if part[1]])


def interval_chart(summary: dict[str, Any]) -> str:
    """Held-out loss of each method: mean, and one standard deviation either way; lower is better."""
    rows = [row for row in summary["rows"] if row["test"]]
    if not rows:
        return ""
    base = summary["base"]["test"]
    means, deviations = ([row["test"][key] for row in rows] for key in ("mean", "deviation"))
    low = min(mean - deviation for mean, deviation in zip(means, deviations, strict=True))
    high = max(mean + deviation for mean, deviation in zip(means, deviations, strict=True))
    margin = 0.1 * (high - low) or 0.01 * high
    low, high = low - margin, high + margin  # not from 0, which would press the methods together
    near = base is not None and low <= base <= high

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.1f}%"

    lines = []
    for row in rows:
        mean, deviation = row["test"]["mean"], row["test"]["deviation"]
        marks = '<line class="tick" x1="0" x2="100%" y1="14" y2="14"/>'
        if near:
            marks += f'<circle class="base" cx="{at(base)}" cy="14" r="5"/>'
        marks += f'<line class="interval" x1="{at(mean - deviation)}" x2="{at(mean + deviation)}" y1="14" y2="14"/>'
        marks += f'<circle class="ours" cx="{at(mean)}" cy="14" r="6"/>'
        lines.append(
            f'<div class="task">{escape(row["method"])}</div><svg class="track" height="28" role="img" '
            f'aria-label="{escape(row["method"])}: {mean:.4f}">{marks}</svg><div class="value">{mean:.4f}</div>'
        )
    key = '<span><i class="dot ours"></i>held-out loss, ± one deviation over seeds; lower is better</span>'
    if near:
        key += '<span><i class="dot base"></i>base model, untrained</span>'
    elif base is not None:
        key += f"<span>base model, untrained: {base:.4f}, outside</span>"
    axis = f'<div></div><div class="axis"><span>{low:.4g}</span><span>{high:.4g}</span></div><div></div>'
    return f'<div class="legend">{key}</div><div class="accuracy">{"".join(lines)}{axis}</div>'


def rates(summary: dict[str, Any]) -> str:
    """What each try was judged by: the loss on the part that chooses."""
    most = max(len(row["tries"]) for row in summary["rows"])
    lines = []
    for row in summary["rows"]:
        told = [
            f"{rate}: " + ("diverged" if loss is None else f"{loss:.4f}") + (" ✓" if float(rate) == row["lr"] else "")
            for rate, loss in row["tries"].items()
        ]
        lines.append([row["method"], *told])
    said = "Loss on the part that chooses, first seed; ✓ the one chosen."
    return html_table(["method", *["rate: loss"] * most], lines) + paragraphs([said])


def curves(out: Path, summary: dict[str, Any]) -> str:
    """One curve a method, on axes that begin and end alike."""
    found = []
    for row in summary["rows"]:
        if not row["seeds"]:
            continue
        file = out / "runs" / folder_of(row["method"]) / f"lr-{row['lr']:g}-seed-{row['seeds'][0]}" / "metrics.jsonl"
        if file.is_file() and (lines := read_metrics(file)):
            found.append((row["method"], lines))
    losses = [line["loss"] for _, logged in found for line in logged]
    charts = [
        line_chart(
            method,
            "",
            [line["step"] for line in logged],
            [line["loss"] for line in logged],
            lambda v: f"{v:.3g}",
            span=(min(losses), max(losses)),
            noisy=True,
        )
        for method, logged in found
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def write_comparison(out: Path, summary: dict[str, Any]) -> None:
    """Write comparison.json and report.html into `out`."""
    write_json(out / "comparison.json", summary)
    write_text(out / "report.html", comparison_page(out, summary))
