"""The page around a report: one file, no network, light and dark, from a phone's width up."""

from collections.abc import Sequence
from html import escape
from pathlib import Path


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """`sections`: (heading, HTML)."""
    here = Path(__file__).parent
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{(here / "page.css").read_text()}</style></head>
<body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header><main>{body}</main>
<script>{(here / "page.js").read_text()}</script></body></html>
"""


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (label, value, what it is of)."""
    each = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(of)}</small></dd></div>"
        for label, value, of in figures
    )
    return f'<dl class="tiles">{"".join(each)}</dl>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the screen is narrower. The first column is names."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{_breakable(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _breakable(name: str) -> str:
    """A name that may wrap after its colons and commas."""
    return escape(name).replace(":", ":<wbr>").replace(",", ",<wbr>")


def notes(lines: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
