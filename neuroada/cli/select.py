"""Phase 1 alone: choose k connections for every neuron of a checkpoint, without building its model.

    neuroada select --model models/llama-7b --k 20 --out llama7b_top20.safetensors

The file holds indices only, a checksum of itself, and the fingerprint of the weights it was made from.
"""

import argparse
import json
import os
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, as far as they can be judged without a heavy import."""
    parser = Parser(prog="neuroada select", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder of safetensors, or a hub id")
    parser.add_argument("--k", type=int, required=True, help="connections of each neuron")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="must not exist")
    parser.add_argument("--selection", choices=("magnitude", "lift", "reverse", "random"), default="magnitude")
    parser.add_argument("--lift-rank", type=int, default=128, metavar="RANK", help="of --selection lift")
    parser.add_argument("--seed", type=int, default=0, help="of --selection random")
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help="default: by the model's type")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, a tensor each (default: one a core)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    for name in ("k", "lift_rank", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.workers > 1024:
        raise UserError(f"--workers {args.workers}: more processes than one machine runs; leave it out for one a core")
    if args.model.startswith((".", "/", "~")) and not Path(args.model).is_dir():
        raise UserError(f"--model {args.model}: no such folder; give one with safetensors in it, or a hub id")
    if args.out.exists():
        raise UserError(f"--out {args.out}: is already there; choose a new file or remove it")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    from neuroada.hf.tensor_files import resolve
    from neuroada.offline.select import select

    done = select(
        resolve(args.model, "--model"),
        args.k,
        args.out,
        selection=args.selection,
        lift_rank=args.lift_rank,
        seed=args.seed,
        target_modules=args.target_modules,
        workers=args.workers,
        progress=not args.json,
    )
    if args.json:
        print(json.dumps(done))
    else:
        for name, value in done.items():
            print(f"{name:17} {value}" if isinstance(value, str | bool) else f"{name:17} {value:,}")
