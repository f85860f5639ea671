"""Train a recipe, on one process or many.

python launch/train.py --recipe smollm2_math [key=value ...]
deepspeed launch/train.py --recipe llama13b_math [key=value ...]
torchrun --nproc-per-node 8 launch/train.py --recipe llama13b_math engine.name=fsdp2
python launch/train.py --recipe llama13b_math --dry-run ranks=8
"""

import argparse
import gc
import os

from neuroada.command import run
from neuroada.errors import UserError
from neuroada.training.preemption import StopRequest
from neuroada.training.recipe import load_recipe


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    stop = StopRequest()
    recipe = load_recipe(args.recipe, args.overrides)

    # torch and its friends, once the recipe stands
    from neuroada.evaluation.trained import check_tasks, evaluate_trained
    from neuroada.reporting import write_report
    from neuroada.tasks.table import get_task
    from neuroada.training.run import train

    generated = [] if get_task(recipe.task).num_labels else recipe.evaluate.tasks  # a classifier is scored as it trains
    if generated:
        check_tasks(generated, recipe.data_dir)
    trained = train(recipe, stop)
    if generated:
        gc.collect()  # the engine and its weights
        evaluate_trained(trained, recipe.model, recipe.task, generated, recipe.data_dir, recipe.evaluate.limit)
    if os.environ.get("RANK", "0") == "0":
        if generated:
            write_report(trained.parent)
        print(f"trained: {trained}")


def walk(name: str, overrides: list[str]) -> None:
    """Print what a run would find and need; `ranks=N` says on how many ranks."""
    ranks = [override.removeprefix("ranks=") for override in overrides if override.startswith("ranks=")]
    if not all(text.isdecimal() and int(text) for text in ranks):
        raise UserError(f"ranks={ranks[-1]}: must be a whole number of at least 1")
    recipe = load_recipe(name, [override for override in overrides if not override.startswith("ranks=")])

    from neuroada.training.dry_run import dry_run

    print(dry_run(recipe, int(ranks[-1]) if ranks else 1))


if __name__ == "__main__":
    run(main)
