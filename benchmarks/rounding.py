"""What rounding costs: the same run with exact values, with values rounded into a bf16 weight, and in bf16 throughout.

    python benchmarks/rounding.py --recipe quickstart --steps 60 --seeds 1 2 3

The base weights are rounded to bf16 once; every variant then computes in fp32, so that they differ in one thing:

exact     W + delta as it is: what a side path in fp32 beside the weight would compute
rounded   the written entries rounded to bf16, delta and AdamW's moments in fp32: a bf16 run of this project
bf16      as rounded, and delta and moments rounded to bf16 after every step: no fp32 master anywhere

Printed are the answer loss on questions outside the training set, the part of the connections whose written value is
still the base's when training ends, and the median part of a delta that rounding takes off or adds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from neuroada.adapter import NeuroAdaLinear
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.engines import STATE
from neuroada.ops import linear
from neuroada.training.schedule import lr_at
from neuroada.training.signals import StopRequest
from neuroada.training.trainer import Trainer

VARIANTS = ("exact", "rounded", "bf16")
exactly = linear.adapted


def round_to_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def rounded(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return round_to_bf16(exactly(base, delta))


@contextmanager
def writing(variant: str) -> Iterator[None]:
    linear.adapted = exactly if variant == "exact" else rounded
    try:
        yield
    finally:
        linear.adapted = exactly


def train(recipe: Recipe, variant: str, steps: int) -> tuple[float, float, float]:
    """(held-out loss, part of the connections that did not move, median relative rounding of a delta)."""
    torch.manual_seed(recipe.train.seed)
    trainer = Trainer(recipe, StopRequest())
    trainer.load()
    engine, model = trainer.engine, trainer.model
    layers = [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
    with torch.no_grad():
        for param in model.parameters():
            if not param.requires_grad and param.is_floating_point():
                param.copy_(round_to_bf16(param))  # selection's order of sizes is kept: rounding is monotonic
    with writing(variant):
        for step in range(steps):
            trainer.run_micro_batches(step)
            engine.step(lr_at(step, steps, recipe.optimizer))
            if variant == "bf16":
                for param, state in engine.optimizer.state.items():
                    for values in (param.data, *(state[key] for key in STATE)):
                        values.copy_(round_to_bf16(values))
        losses = trainer.objective.held_out_losses(model.eval(), trainer.objective.tokenizer)
    base = torch.cat([layer.base_values("default").flatten() for layer in layers])
    delta = torch.cat([layer.neuroada_delta["default"].detach().flatten() for layer in layers])
    moved = round_to_bf16(base + delta) - base
    trained = delta != 0
    lost = ((moved - delta)[trained] / delta[trained]).abs().median().item()
    return losses["test"], (moved == 0).float().mean().item(), lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--held-out", type=int, default=200, metavar="N", help="questions the loss is measured on")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    print("| variant | held-out answer loss, by seed | mean | did not move | rounding / delta, median |")
    print("| --- | --- | --- | --- | --- |")
    for variant in VARIANTS:
        found = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                fields = [f"train.seed={seed}", f"train.held_out={args.held_out}", f"train.max_steps={args.steps}",
                          "engine.name=single", f"output_dir={Path(folder, 'run')}", *args.overrides]  # fmt: skip
                found.append(train(load_recipe(args.recipe, fields), variant, args.steps))
        losses, still, lost = zip(*found, strict=True)
        print(f"| {variant} | {', '.join(f'{loss:.4f}' for loss in losses)} | {statistics.mean(losses):.4f} | "
              f"{100 * statistics.mean(still):.1f} % | {100 * statistics.mean(lost):.1f} % |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
