"""Train a recipe, on one process or many.

python launch/train.py --recipe smollm2_math [key=value ...]
deepspeed launch/train.py --recipe llama13b_math [key=value ...]
torchrun --nproc-per-node 8 launch/train.py --recipe llama13b_math engine.name=fsdp2
"""

import argparse
import os

from neuroada.command import run
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
    args = parser.parse_args(argv)
    stop = StopRequest()
    recipe = load_recipe(args.recipe, args.overrides)

    from neuroada.training.run import train  # torch and its friends, once the recipe stands

    adapter = train(recipe, stop)
    if os.environ.get("RANK", "0") == "0":
        print(f"adapter: {adapter}")


if __name__ == "__main__":
    run(main)
