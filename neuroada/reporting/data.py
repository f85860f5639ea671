"""The sections of a run's report on own data: what they came to, an example, the validation loss."""

from html import escape

from neuroada.reporting.charts import line_chart
from neuroada.reporting.page import html_table, notes
from neuroada.runs.run_folder import RunFolder


def data(run: RunFolder) -> str:
    """Sources, lengths, what was left out, and the first example with its learnt tokens marked."""
    summary = run.data["summary"]
    rows = []
    for source in summary["sources"]:
        lost = [f"{count:,} {why}" for why, count in source["dropped"].items()]
        lost += [f"{source[name]:,} {name}" for name in ("truncated", "split", "skipped") if source[name]]
        name = source["path"].rsplit("/", 1)[-1]  # a report tells no path of the machine it was made on
        counts = [f"{source['rows']:,}", f"{source['sequences']:,}"]
        rows.append([name, source["format"], *counts, "; ".join(lost) or "none"])
    said = [
        f"{summary['sequences']:,} sequences of {summary['p50']} (median), {summary['p95']} (95 %) and at most "
        f"{summary['longest']} tokens; {summary['learnt']:,} of {summary['tokens']:,} tokens are learnt; padding would "
        f"add {100 * summary['padding'] / (1 - summary['padding']):.0f} %."
    ]
    shown = "".join(f"<pre>{_marked(pieces)}</pre>" for pieces in run.data["examples"])
    table = html_table(["source", "format", "rows", "sequences", "left out"], rows)
    return table + notes(said) + notes(["The first example; what is learnt is marked."]) + shown


def _marked(pieces: list[tuple[str, bool]]) -> str:
    return "".join(f"<mark>{escape(text)}</mark>" if learnt else escape(text) for text, learnt in pieces)


def validation(run: RunFolder) -> str:
    """The loss on held-out examples over steps, and the last samples."""
    steps = [entry["step"] for entry in run.validation]
    losses = [entry["loss"] for entry in run.validation]
    chart = line_chart(
        "Validation loss", run.loss_unit, steps, losses, lambda v: f"{v:.4g}", span=(min(losses), max(losses))
    )
    trained = [entry for entry in run.validation if entry["step"]]
    if not trained:  # stopped before the first measurement of what it trained
        return f'<div class="charts">{chart}</div>'
    best = min(trained, key=lambda entry: entry["loss"])
    said = notes([f"Lowest at step {best['step']}: {best['loss']:.4f}. The adapter of that step is the one saved."])
    samples = best["samples"]
    table = html_table(["prompt", "answer", "expected"], [[s["prompt"], s["answer"], s["expected"]] for s in samples])
    return f'<div class="charts">{chart}</div>' + said + (table if samples else "")
