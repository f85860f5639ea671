"""Names that look like rich's markup are printed as they are, wherever a command prints a table."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from neuroada.cli import check_data
from neuroada.comparison import summary
from neuroada.data.preview import coloured, print_summary
from neuroada.data.summary import Summary
from neuroada.evaluation import results
from neuroada.objectives import epoch_validation
from neuroada.tasks.checking import Checked, Overlap

PACKAGE = Path(__file__).resolve().parents[1] / "neuroada"
ODD = "[red]x[/red] [/] :smile:"
SCORE = {"n": 4, "published": 0.5, "sound": 0.5, "baseline": 0.25, "unseen": None, "frozen_base": None,
         "interval": {"published": [0.1, 0.9], "sound": [0.1, 0.9]}, "metric": "accuracy",
         "validation": {"epoch": 1, "score": 0.5}}  # fmt: skip


def consoles() -> Iterator[tuple[str, ast.Call]]:
    """Every Console that the package makes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                yield str(path.relative_to(PACKAGE)), node


def test_no_console_reads_markup() -> None:
    found = [(path, {word.arg: ast.unparse(word.value) for word in call.keywords}) for path, call in consoles()]
    assert len(found) >= 5
    assert [
        path for path, options in found if (options.get("markup"), options.get("emoji")) != ("False", "False")
    ] == []


def compared() -> Any:
    row = {"method": ODD, "trainable": 1, "lr": 0.1, "at_the_edge": False, "seeds": [1], "diverged": 0, "test": None,
           "difference": None, "accuracy": {}, "step_seconds": None, "peak_memory_bytes": None, "saved_bytes": None,
           "merged_cost": None}  # fmt: skip
    return summary.table({"task": ODD, "model": ODD, "base": {"test": None, "accuracy": {}}, "rows": [row]})


@pytest.mark.parametrize(
    "table",
    [
        lambda: results.table({"adapter": ODD, "model": "m", "tasks": {ODD: SCORE}, "averages": {ODD: SCORE}}),
        lambda: epoch_validation.table({"adapter": ODD, "tasks": {ODD: SCORE}}),
        compared,
    ],
    ids=["evaluate", "a classifier's score", "compare"],
)
def test_tables_show_names_as_they_are(table: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Console(markup=False, emoji=False, width=200).print(table())
    assert ODD in capsys.readouterr().out


def test_check_data_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = Checked(set=ODD, split="test", suite="math", rows=1, unique_questions=1, duplicates=0, tokens=None)
    overlap = Overlap(test=ODD, train=ODD, same_suite=True, questions=1, share=1.0)
    check_data.print_tables([file], [overlap])
    assert capsys.readouterr().out.count(ODD) == 3


def test_preview_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    source = {"path": ODD, "format": "chat", "rows": 1, "sequences": 1, "dropped": {ODD: 1}, "truncated": 0, "split": 0,
              "unrolled": 0, "skipped": 1, "skipped_rows": [ODD]}  # fmt: skip
    found = Summary([source], sequences=1, tokens=2, learnt=1, p50=1, p95=1, longest=1, items=1, held_out=0, padding=0)
    print_summary(found, Console(markup=False, emoji=False, width=200))
    assert capsys.readouterr().out.count(ODD) == 3


def test_a_text_s_commands_to_a_terminal_are_written_out() -> None:
    """Data is somebody else's: its escape codes could change the terminal's title, say, or hide what was printed."""

    class Tokens:
        ids = learnt = np.array([1])

        def __len__(self) -> int:
            return 1

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return "\x1b]0;title\x07\n[red]漢"

    assert coloured(Tokens(), Tokenizer(), 9).plain == "\\x1b]0;title\\x07\n[red]漢"  # type: ignore[arg-type]
