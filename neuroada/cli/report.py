"""Write a run's report.html and model card again, after it has been scored, say.

neuroada report runs/llama7b_math

With base/results.json in the run's folder (launch/evaluate.py --model BASE --tasks ... --out RUN/base) the report sets
the base model's accuracy beside the run's.
"""

import argparse
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.errors import UserError


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's folder, or a comparison's")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run's, such as runs/quickstart")
    if (folder / "comparison.json").is_file():
        from neuroada.comparison.files import read_summary
        from neuroada.comparison.page import write_comparison

        write_comparison(folder, read_summary(folder / "comparison.json"))
    else:
        from neuroada.reporting import write_report

        write_report(folder)
    print(f"report: {folder / 'report.html'}")
