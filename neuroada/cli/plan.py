"""Plan a recipe before anybody pays for it: memory of a rank, work of a step, the strategy that fits a card.

neuroada plan --recipe llama13b_math --gpus 4 --gpu-memory 24
neuroada plan --recipe llama7b_math --compare train.micro_batch_size=1 train.max_length=2048
"""

import argparse
import json

from neuroada.cli.command import Parser
from neuroada.config.recipe import load_recipe


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a YAML file")
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="ranks, one card each (default: 1)")
    parser.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="of one card: recommend what fits it")
    parser.add_argument("--tokens-per-second", type=_positive, help="measured, of all ranks: then hours are told")
    parser.add_argument("--compare", action="store_true", help="the methods side by side, one process")
    parser.add_argument("--json", action="store_true", help="for a machine: bytes of one rank")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.activation_checkpointing=true")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)

    from neuroada.planning import report
    from neuroada.planning.plan import GIB, compare_methods, make_plan

    if args.compare:
        methods, left_out = compare_methods(recipe)
        rows = [{"method": name, "peak_bytes": m.peak_bytes, "by_kind": m.by_kind} for name, m in methods.items()]
        print(json.dumps(rows, indent=2) if args.json else report.comparison(recipe, methods, left_out))
        return
    plan = make_plan(recipe, args.gpus, args.gpu_memory * GIB if args.gpu_memory else None)
    if args.json:
        print(json.dumps(plan.chosen.as_json() | {"strategies": [rank.as_json() for rank in plan.ranks]}, indent=2))
    else:
        print(report.plan(plan, args.gpu_memory, args.tokens_per_second))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)
