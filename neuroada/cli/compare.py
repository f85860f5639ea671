"""Compare methods on one task, or on own data: a learning rate chosen for each by as many tries, then seeds, one table.

neuroada compare --recipe quickstart --methods neuroada:k=20 lora:rank=8 shira:rank=8 full@1e-5,3e-5,1e-4 \\
    --lrs 1e-3,3e-3,1e-2 --seeds 1,2,3 --validation 200 --out runs/compare train.max_steps=100

A method is name[:field=value,...][@rate,...]: fields of the recipe's adapter section, and learning rates of its own.
--match trainable=0.02% sets every method's size (k, rank, sparsity) to train nearest to that share of the base's
parameters, or to a number (trainable=3110400).
--general-text FILE also scores that text by the untrained model and after each run: how much training forgets.
--validation N keeps 2 x N questions of the training set out of every run: N to choose the rate by, N to test on; over
own data the recipe's data.validation does, and its loss is what is reported. The rates are tried with the first seed.
--widen goes on trying, by the same factor, where the best rate is the lowest or the highest tried.
Every run is a fresh process and a folder; the same command goes on where it was. --jobs N has N runs at a time.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from neuroada.cli.command import Parser
from neuroada.comparison.contenders import EXAMPLE, Comparison, Contender, numbers, read_contenders
from neuroada.comparison.runs import one
from neuroada.comparison.search import search, visible_gpus
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="neuroada compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a YAML file")
    parser.add_argument("--methods", required=True, nargs="+", metavar="METHOD", help=EXAMPLE)
    parser.add_argument("--lrs", default="", metavar="A,B", help="learning rates to try, of methods without their own")
    parser.add_argument("--seeds", default="42", metavar="A,B", help="one run each at the chosen rate (default: 42)")
    parser.add_argument(
        "--validation",
        type=int,
        default=0,
        metavar="N",
        help="questions to choose by; as many to test on",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the comparison's folder")
    parser.add_argument(
        "--match", metavar="trainable=N", help="the budget of all methods: N%% of the base, or a number"
    )
    parser.add_argument(
        "--general-text", metavar="FILE", help="text to score before and after (.txt; .jsonl with a text a row)"
    )
    parser.add_argument("--widen", action="store_true", help="try further rates until the best is not at an edge")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, dealt to the GPUs (1)")
    parser.add_argument("--launcher", default=sys.executable, help="such as 'torchrun --nproc-per-node 8'")
    parser.add_argument("--keep", action="store_true", help="keep every run's checkpoints and whole models")
    parser.add_argument("--json", action="store_true", help="print comparison.json instead of a table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run, such as train.max_steps=50")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--measure"]:  # of one run, by a process of its own
        from neuroada.comparison.measure import measure

        return measure(Path(argv[1]), argv[2] == "base", argv[3] if len(argv) > 3 else None)
    args = parse(argv)
    methods, seeds = read_contenders(args.methods, args.lrs), numbers("--seeds", args.seeds, int)
    if not seeds:
        raise UserError("--seeds: names no seed; give some, such as --seeds 1,2,3")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    recipe = load_recipe(args.recipe, args.overrides)
    check_held_out(recipe, args)
    if args.general_text:
        check_general_text(args.general_text, recipe)
    comparison = Comparison(args.recipe, tuple(args.overrides), args.validation, Path(args.out), args.general_text)
    if args.match:
        methods = matched(args.match, methods, comparison)
    recipes = [method.recipe(comparison, lr, seed) for method in methods for lr in method.lrs for seed in seeds]
    for method in methods:
        check_method(method.recipe(comparison, method.lrs[0], seeds[0]))
    run_one = partial(one, comparison=comparison, launcher=args.launcher, keep=args.keep)
    base = Contender("base", (), ()).recipe(comparison, recipes[0].optimizer.lr, seeds[0])
    base = base.model_copy(update={"output_dir": str(comparison.out / "runs" / "base")})
    # A launcher of several ranks places them itself.
    gpus = visible_gpus() if args.jobs > 1 and args.launcher == sys.executable else []
    chosen = search(base, methods, seeds, comparison, run_one, jobs=args.jobs, gpus=gpus, widen=args.widen)
    command = shlex.join(["neuroada", "compare", *argv])
    conclude(comparison.out, recipes[0], chosen, seeds, command, args)


def check_method(recipe: Recipe) -> None:
    """UserError where the method does not fit the objective, or a field of its own: not after other methods' runs."""
    from neuroada.methods import make_method
    from neuroada.objectives import make_objective

    make_objective(recipe).check()
    make_method(recipe).check("single")


def check_held_out(recipe: Recipe, args: argparse.Namespace) -> None:
    """UserError where there is nothing to choose a learning rate by, or it is named twice."""
    if recipe.data is not None:
        if args.validation:
            raise UserError(f"--validation {args.validation}: is of tasks; over own data set data.validation.size")
        if not (recipe.data.validation.size or recipe.data.validation.own_source):
            raise UserError(
                f"--recipe {args.recipe}: has no examples to choose the learning rate by; set data.validation.size"
            )
        return
    from neuroada.objectives import make_objective

    if args.validation < 1 and make_objective(recipe).generates:
        raise UserError(f"--validation {args.validation}: give the number of questions to choose the learning rate by")


def check_general_text(file: str, recipe: Recipe) -> None:
    """UserError where the text cannot be scored: it is read once before anything runs."""
    from neuroada.comparison.general_text import windows
    from neuroada.hf.loading import load_tokenizer
    from neuroada.objectives import make_objective

    if not make_objective(recipe).generates:
        raise UserError(f"--general-text {file}: a classifier of {recipe.task} gives no loss on text; leave it out")
    windows(file, load_tokenizer(recipe.model, "model: "), recipe.train.max_length)


def matched(budget: str, methods: list[Contender], comparison: Comparison) -> list[Contender]:
    """The methods with the sizes that come nearest to the budget; each one without a size as it is."""
    from neuroada.planning.budget import Budget, match

    wanted = Budget.read(budget)
    return [method.sized(match(method.recipe(comparison, method.lrs[0], 0), wanted)) for method in methods]


def conclude(
    out: Path, recipe: Recipe, chosen: dict[str, Any], seeds: list[int], command: str, args: argparse.Namespace
) -> None:
    """Write comparison.json and report.html, print the table."""
    from neuroada.comparison.page import write_comparison
    from neuroada.comparison.summary import summarize, table

    summary = summarize(out, chosen, seeds, task=recipe.trained_on, model=recipe.model, command=command)
    if args.match:
        summary["matched"] = args.match
    if recipe.data is not None:
        from neuroada.objectives import make_objective

        summary["validation_loss"] = make_objective(recipe).loss_unit
    write_comparison(out, summary)
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    from rich.console import Console

    Console(markup=False, emoji=False).print(table(summary))
    print(f"report: {out / 'report.html'}")
