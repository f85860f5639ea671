"""Check every data file under a folder: rows, duplicates, test questions that a training set gives away, lengths.

    neuroada check-data --data-dir data [--tokenizer models/smollm2-135m] [--json]
    neuroada check-data --data-dir data --clean math

A file that cannot be used is named with the row and the key, and the exit status is 2. --clean writes a training set
again without the questions of its suite's test sets, as one to train on: math as the task math_clean.
"""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuroada.cli.command import Parser
from neuroada.errors import UserError
from neuroada.tasks.checking import PERCENTILES, Checked, Overlap, check_folder, clean
from neuroada.tasks.table import get_task


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds <set>/{train,test}.json")
    parser.add_argument("--tokenizer", type=Path, help="folder of a model or tokenizer, for token lengths")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--clean", metavar="TASK", help="write TASK's training set without its suite's test questions")
    args = parser.parse_args(argv)
    if not args.data_dir.is_dir():
        raise UserError(f"--data-dir: {args.data_dir} is no folder; fetch data with launch/fetch.py")
    if args.clean:
        return clean(get_task(args.clean), args.data_dir)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None

    report = check_folder(args.data_dir, tokenizer)
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print_tables(report.files, report.contamination)
    if report.problems:
        raise UserError(" | ".join(report.problems))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"--tokenizer: {folder} is no folder; give one that holds a tokenizer.json")
    from neuroada.hf import loading

    return loading.load_tokenizer(str(folder), "--tokenizer ")


def print_tables(files: list[Checked], overlaps: list[Overlap]) -> None:
    """The files; then of each held-out set, which training sets hold its questions and which of its suite do not."""
    from rich.console import Console
    from rich.table import Table

    with_tokens = any(file.tokens for file in files)
    table = Table("file", title="Files")
    for header in ("rows", "unique", "duplicates", *(f"p{p}" for p in PERCENTILES if with_tokens)):
        table.add_column(header, justify="right")
    for file in files:
        counts = [file.rows, file.unique_questions, file.duplicates, *(file.tokens or {}).values()]
        table.add_row(f"{file.set}/{file.split}", *(f"{count:,}" for count in counts))
    console = Console(markup=False, emoji=False)
    console.print(table)
    if with_tokens:
        console.print("p50 to p100: tokens of prompt, target and EOS; in a test set of the prompt alone")

    contamination = Table("held-out set", "its questions in", "none in", title="Contamination")
    for held_out, group in itertools.groupby(overlaps, key=lambda overlap: overlap.test):
        pairs = list(group)
        found = [f"{pair.train} {pair.questions:,} ({pair.share:.1%})" for pair in pairs if pair.questions]
        clean = [pair.train for pair in pairs if pair.same_suite and not pair.questions]
        contamination.add_row(held_out, "\n".join(found), ", ".join(clean))
    if overlaps:
        console.print(contamination)
