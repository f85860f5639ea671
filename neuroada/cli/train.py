"""Train a recipe, on one process or many.

neuroada train --recipe smollm2_math [key=value ...]
deepspeed launch/train.py --recipe llama13b_math [key=value ...]
torchrun --nproc-per-node 8 launch/train.py --recipe llama13b_math engine.name=fsdp2
neuroada train --recipe llama13b_math --dry-run ranks=8
"""

import argparse
import gc

from neuroada.cli.command import Parser
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.environment import rank
from neuroada.errors import UserError
from neuroada.training.signals import StopRequest


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a YAML file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-3 train.max_steps=50"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="walk the whole path without weights; ranks=N among the overrides"
    )
    args = parser.parse_intermixed_args(argv)
    if args.dry_run:
        walk(args.recipe, args.overrides)
        return
    with StopRequest() as stop:
        run(load_recipe(args.recipe, args.overrides), stop)


def run(recipe: Recipe, stop: StopRequest) -> None:
    """Train, then score and report what evaluate.tasks asks for."""
    # torch and its friends, once the recipe stands
    from neuroada.evaluation.after_training import check_tasks, evaluate_trained
    from neuroada.objectives import make_objective
    from neuroada.reporting import write_report
    from neuroada.training.trainer import train

    generated = make_objective(recipe).generates and recipe.evaluate.tasks
    if generated:
        check_tasks(generated, recipe.data_dir, recipe.model)
    trained = train(recipe, stop)
    if generated:
        gc.collect()  # the engine and its weights
        evaluate_trained(trained, recipe.model, recipe.trained_on, generated, recipe.data_dir, recipe.evaluate.limit)
    if rank() == 0:
        write_report(trained.parent)
        print(f"trained: {trained}")


def walk(name: str, overrides: list[str]) -> None:
    """Print what a run would find and need; `ranks=N` says on how many ranks."""
    ranks = [override.removeprefix("ranks=") for override in overrides if override.startswith("ranks=")]
    if not all(text.isdecimal() and int(text) for text in ranks):
        raise UserError(f"ranks={ranks[-1]}: must be a whole number of at least 1")
    recipe = load_recipe(name, [override for override in overrides if not override.startswith("ranks=")])

    from neuroada.planning.dry_run import dry_run

    print(dry_run(recipe, int(ranks[-1]) if ranks else 1))
