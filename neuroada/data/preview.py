"""The first examples as the model will see them, and what the data come to."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroada.data.encode_source import SourceEncoder
from neuroada.data.encoding import Tokens
from neuroada.data.summary import Summary

LEARNT, MASKED, CUT = "bold green", "dim", "red"
_BRACKETS = {LEARNT: ("«", "»"), MASKED: ("", ""), CUT: ("~~", "~~")}
_NOTES = {
    "truncated": "examples cut at their end, at train.max_length tokens",
    "split": "examples divided into several sequences",
    "unrolled": "chats that are a sequence for each assistant turn: the template rewrites earlier turns",
    "skipped": "bad rows skipped",
}


def coloured(tokens: Tokens, tokenizer: Any, kept: int, colours: bool = True) -> Text:
    """The text of a sequence: learnt tokens in bold green, read ones dimmed, those from position `kept` on in red.

    Without colours (a file, a pipe): learnt tokens stand in «», those that are left out in ~~.
    """
    styles = [CUT if p >= kept else LEARNT if learnt else MASKED for p, learnt in enumerate(tokens.learnt.tolist())]
    said, start = Text(), 0
    for style, run in groupby(styles):
        end = start + len(list(run))
        before, after = ("", "") if colours else _BRACKETS[style]
        text = tokenizer.decode(tokens.ids[start:end].tolist())
        said.append(before + (_harmless(text) if colours else text) + after, style)
        start = end
    return said


def _harmless(text: str) -> str:
    """`text` with the characters that a terminal would take for commands written out, such as \\x1b."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


def print_examples(encode: SourceEncoder, examples: int, console: Console) -> None:
    """The first `examples` rows of every source, as the model will see them."""
    names = [(LEARNT, "learnt"), (MASKED, "read only"), (CUT, "left out")]
    if not console.is_terminal:
        names = [(style, _BRACKETS[style][0] + name + _BRACKETS[style][1]) for style, name in names]
    console.print(Text("  ").join(Text(name, style) for style, name in names))
    for spec in encode.data.datasets:
        for where, units in encode.first(spec, examples):
            for unit in units:
                _print_unit(where, unit, encode, console)


def _print_unit(where: str, unit: list[Tokens], encode: SourceEncoder, console: Console) -> None:
    limit, excess = encode.max_length, encode.data.excess_length
    too_long = max(map(len, unit)) > limit
    kept = {"drop": 0, "error": 0, "truncate": limit}.get(excess, sys.maxsize) if too_long else sys.maxsize
    for number, tokens in enumerate(unit):
        name = f", {('chosen', 'rejected')[number]}" if len(unit) == 2 else ""
        longer = f", more than train.max_length = {limit} (excess_length: {excess})" if too_long else ""
        title = f"{where}{name}: {len(tokens)} tokens, {int(tokens.learnt.sum())} learnt{longer}"
        # Never wrapped here: a file keeps the text as it is, a terminal wraps by itself.
        console.print(Text(f"\n{title}", "bold"), soft_wrap=True)
        console.print(coloured(tokens, encode.tokenizer, kept, console.is_terminal), soft_wrap=True)


def print_summary(summary: Summary, console: Console) -> None:
    table = Table(title="data", title_justify="left")
    for column in ("source", "format", "rows", "sequences", "left out"):
        table.add_column(column, justify="left" if column in ("source", "format", "left out") else "right")
    for source in summary.sources:
        lost = [f"{count:,} {why}" for why, count in source["dropped"].items()]
        lost += [f"{source[name]:,} {note}" for name, note in _NOTES.items() if source[name]]
        table.add_row(
            source["path"],
            source["format"],
            f"{source['rows']:,}",
            f"{source['sequences']:,}",
            "; ".join(lost) or "none",
        )
    console.print(table)
    for source in summary.sources:
        for line in source["skipped_rows"]:
            console.print(f"skipped: {line}", style="yellow", markup=False, highlight=False)
    part = summary.learnt / summary.tokens
    console.print(
        f"{summary.sequences:,} sequences of {summary.p50} (median), {summary.p95} (95 %), {summary.longest} (longest) "
        f"tokens; {summary.tokens:,} tokens, {summary.learnt:,} learnt ({100 * part:.0f} %); "
        f"{summary.items:,} items an epoch; {summary.held_out:,} sequences held out; "
        f"padding would add {100 * summary.padding / (1 - summary.padding):.0f} %",
        highlight=False,
    )
