"""Charts as HTML: SVG for the marks, which stretch, and HTML for the text, which stays legible at any width."""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

POINTS = 800  # of a curve: more than a screen shows


def line_chart(
    title: str,
    unit: str,
    x: Sequence[float],
    y: Sequence[float],
    form: Callable[[float], str],
    *,
    span: tuple[float, float] = (0.0, 0.0),
    noisy: bool = False,
) -> str:
    """A curve over steps; a noisy one with its moving mean.

    `form` writes a value. `span`: what the axis covers besides the curve.
    """
    first = x[0]
    x, y = _thin(x, y)
    smooth = _moving_mean(y) if noisy and len(y) >= 40 else None
    ticks = nice_ticks(min(span[0], *y), max(span[1], *y))
    low, high = ticks[0], ticks[-1]
    left, right = x[0], max(x[-1], x[0] + 1)

    def path(values: Sequence[float]) -> str:
        points = (
            f"{1000 * (at - left) / (right - left):.1f},{300 * (high - value) / (high - low):.1f}"
            for at, value in zip(x, values, strict=True)
        )
        return "M" + "L".join(points)

    def place(tick: float) -> float:
        return 100 * (high - tick) / (high - low)

    grid = "".join(f'<line x1="0" x2="1000" y1="{3 * place(t):.1f}" y2="{3 * place(t):.1f}"/>' for t in ticks)
    labels = "".join(f'<span style="top:{place(t):.1f}%">{escape(form(t))}</span>' for t in ticks)
    curves = f'<path class="{"raw" if smooth else "curve"}" d="{path(y)}"/>'
    if smooth:
        curves += f'<path class="curve" d="{path(smooth)}"/>'
    data = {"x": x, "y": [form(value) for value in y], "at": [(value - left) / (right - left) for value in x]}
    noted = " <small>· thick: moving mean</small>" if smooth else ""
    return f"""<figure class="chart" data-points="{escape(json.dumps(data, separators=(",", ":")))}">
<figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small>{noted}</figcaption>
<output></output>
<div class="plot"><div class="ylabels">{labels}</div>
<div class="area"><svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img"
aria-label="{escape(title)}: from {escape(form(y[0]))} to {escape(form(y[-1]))}">
<g class="grid">{grid}</g>{curves}</svg>
<i class="cursor"></i></div></div>
<div class="xlabels"><span>step {first:g}</span><span>{x[-1]:g}</span></div>
</figure>"""


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `wanted` steps apart."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: means of equal runs of steps."""
    run = math.ceil(len(y) / POINTS)
    if run == 1:
        return list(x), list(y)
    starts = range(0, len(y), run)
    return [x[min(i + run, len(x)) - 1] for i in starts], [sum(y[i : i + run]) / len(y[i : i + run]) for i in starts]


def _moving_mean(y: Sequence[float]) -> list[float]:
    """The mean of a window of a fifteenth of the curve around each point."""
    half = max(2, len(y) // 30)
    windows = (y[max(0, i - half) : i + half + 1] for i in range(len(y)))
    return [sum(window) / len(window) for window in windows]


def accuracy_chart(rows: Sequence[dict[str, Any]]) -> str:
    """One line a task: {"task", "value", "interval": (low, high) | None, "base", "published", "baseline"}, all 0..1."""
    lines = []
    for row in rows:
        marks = "".join(f'<line class="tick" x1="{at}%" x2="{at}%" y1="0" y2="28"/>' for at in (0, 25, 50, 75, 100))
        if row["interval"]:
            low, high = row["interval"]
            marks += f'<line class="interval" x1="{100 * low:.1f}%" x2="{100 * high:.1f}%" y1="14" y2="14"/>'
        if row["base"] is not None:
            marks += f'<circle class="base" cx="{100 * row["base"]:.1f}%" cy="14" r="5"/>'
        marks += f'<circle class="ours" cx="{100 * max(0, row["value"]):.1f}%" cy="14" r="6"/>'
        if row["published"] is not None:
            marks += f'<svg x="{100 * row["published"]:.1f}%" y="14" overflow="visible">'
            marks += '<path class="published" d="M0-5L5 0L0 5L-5 0Z"/></svg>'
        told = f"{100 * row['value']:.1f}"
        lines.append(
            f'<div class="task">{escape(row["task"])}</div><svg class="track" height="28" role="img" '
            f'aria-label="{escape(row["task"])}: {told}">{marks}</svg><div class="value">{told}</div>'
        )
    shown = {key for row in rows for key in ("base", "published") if row[key] is not None}
    key = '<span><i class="dot ours"></i>this run, sound rule, 95 % interval</span>'
    key += '<span><i class="dot base"></i>base model</span>' if "base" in shown else ""
    key += '<span><i class="dot published"></i>published</span>' if "published" in shown else ""
    axis = '<div></div><div class="axis"><span>0</span><span>50</span><span>100 %</span></div><div></div>'
    return f'<div class="legend">{key}</div><div class="accuracy">{"".join(lines)}{axis}</div>'


def heat_map(title: str, cells: dict[tuple[int, str], float], columns: dict[str, str]) -> str:
    """Layers down, projections across (`columns`: name -> label); the colour is the value over the largest."""
    layers = sorted({layer for layer, _ in cells})
    highest = max(cells.values())
    power = math.floor(math.log10(highest)) if highest > 0 else 0
    lines = []
    for layer in layers:
        line = [f'<th scope="row">{layer}</th>']
        for name in columns:
            value = cells.get((layer, name))
            if value is None:
                line.append("<td></td>")
                continue
            share = round(100 * value / highest) if highest else 0
            strong = ' class="strong"' if share > 78 else ""
            line.append(
                f'<td{strong} style="--share:{share}%" title="layer {layer}, {escape(name)}: {value:.3g}">'
                f"{value / 10**power:.1f}</td>"
            )
        lines.append(f"<tr>{''.join(line)}</tr>")
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns.values())
    digits = str(power).replace("-", "−")
    unit = f" <small>in 10<sup>{digits}</sup></small>" if power else ""
    return (
        f'<figure class="heat"><figcaption><b>{escape(title)}</b>{unit}</figcaption>'
        f'<div class="scroll"><table><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def column_labels(names: Sequence[str]) -> dict[str, str]:
    """name -> its shortest ending that is no other's, without the _proj all share."""
    labels = {}
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if sum(other == ending or other.endswith(f".{ending}") for other in names) == 1:
                break
        labels[name] = ending.removesuffix("_proj")
    return labels
