"""Examine this machine: what it has, and whether the project's claims hold on it. The first thing to run on a new GPU.

neuroada doctor
neuroada doctor --checks kernel-gradient engine-fsdp2 --out doctor.json

Prints one table and writes one JSON file, to send in with a report. docs/doctor.md says what each check claims. Exit
status 1 where a claim fails.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.environment import world_size
from neuroada.errors import UserError


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", metavar="NAME", help="these alone (default: all, see docs/doctor.md)")
    parser.add_argument("--out", type=Path, default=Path("doctor.json"), help="default: doctor.json")
    args = parser.parse_args(argv)
    if world_size() > 1:
        raise UserError("neuroada doctor: started with several ranks; start one process, which starts its own")

    import torch
    from rich.console import Console

    from neuroada.doctor import CHECKS, Place, examine, table

    names = [check.name for check in CHECKS]
    for name in args.checks or []:
        if name not in names:
            raise UserError(f"--checks {name}: no such check; checks: {', '.join(names)}")
    wanted = [check for check in CHECKS if not args.checks or check.name in args.checks]
    warnings.simplefilter("ignore")  # of libraries, to trainers: they would bury the table
    with tempfile.TemporaryDirectory() as folder:
        place = Place(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), Path(folder))
        report = examine(wanted, place, args.out, lambda name: print(f"{name} ...", file=sys.stderr, flush=True))
    Console(markup=False, emoji=False).print(table(report))
    print(f"written: {args.out}")
    if report.failed:
        print(f"failed: {', '.join(report.failed)}; please send {args.out} in", file=sys.stderr)
        sys.exit(1)
