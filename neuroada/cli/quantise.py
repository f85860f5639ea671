"""Store a base model's Linear layers in four or eight bits, once: the folder then loads at once under every engine.

neuroada quantise --model models/llama-13b --format nf4 --exact 20 --out models/llama-13b-nf4

A recipe's base section does the same while it loads an ordinary checkpoint. The source is never touched.
"""

import argparse
import json
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, as far as they can be judged without a heavy import."""
    parser = Parser(prog="neuroada quantise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder of safetensors, or a hub id")
    parser.add_argument("--format", choices=("nf4", "int8", "fp8"), default="nf4")
    parser.add_argument(
        "--exact", type=int, required=True, metavar="N", help="the largest entries of each row keep their value: use k"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.exact < 0:
        raise UserError(f"--exact {args.exact}: must not be negative")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    from neuroada.hf.tensor_files import resolve
    from neuroada.offline.quantise import quantise_folder
    from neuroada.quantised import Quantisation

    source = resolve(args.model, "--model")
    done = quantise_folder(source, args.out, Quantisation(args.format, args.exact), progress=not args.json)
    if args.json:
        print(json.dumps(done))
    else:
        for name, value in done.items():
            print(f"{name:17} {value}" if isinstance(value, str) else f"{name:17} {value:,}")
