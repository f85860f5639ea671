"""Where the memory claim holds: planned peaks of NeuroAda beside masked and full tuning and LoRA, by model and shape.

python benchmarks/memory_by_shape.py [--recipes llama7b_math llama13b_math llama33_70b_math] [--json FILE]

One process, k = 20, everything that trains in bf16 as the authors have it (NeuroAda's deltas and LoRA's matrices stay
fp32), the mask of one byte an entry. GB (1e9 bytes) at the peak of a step, by the planner; nothing is measured. Every
sequence has the full length, a loss on every token: packed or padded, a batch then holds as many tokens.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada.config.recipe import Recipe, load_recipe
from neuroada.hf.config import find_config
from neuroada.methods import make_method
from neuroada.planning.step import record_step
from neuroada.planning.strategies import memory

METHODS = ("neuroada", "lora", "masked", "full")
RECIPES = ("llama7b_math", "llama13b_math", "llama33_70b_math")


@dataclass(frozen=True)
class Shape:
    """One forward pass: `rows` sequences of `length` tokens, padded or packed."""

    told: str
    rows: int
    length: int
    packing: bool = True
    checkpointing: bool = False

    def overrides(self) -> list[str]:
        train = {
            "micro_batch_size": self.rows,
            "global_batch_size": self.rows,
            "max_length": self.length,
            "packing": self.packing,
            "activation_checkpointing": self.checkpointing,
        }
        return [f"train.{name}={str(value).lower()}" for name, value in train.items()]


SHAPES = (
    Shape("1 x 2048", 1, 2048),
    Shape("1 x 2048, checkpointing", 1, 2048, checkpointing=True),
    Shape("16 x 512 padded", 16, 512, packing=False),
    Shape("16 x 512 packed", 16, 512),
    Shape("16 x 512 packed, checkpointing", 16, 512, checkpointing=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE", help="names in recipes/, or files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same in bytes")
    args = parser.parse_args()
    print("| model | shape | NeuroAda | LoRA, r = 8 | masked | full | NeuroAda less masked | less LoRA |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rows = []
    for name in args.recipes:
        for row in compare(name):
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def compare(name: str, shapes: tuple[Shape, ...] = SHAPES) -> Iterator[dict[str, Any]]:
    """{"model", "shape", method: bytes at the peak} of each shape of the recipe `name`."""
    for shape in shapes:
        recipe = load_recipe(name, ["optimizer.weight_decay=0", "adapter.trainable_dtype=bf16", *shape.overrides()])
        yield {"model": recipe.model, "shape": shape.told, **{method: peak(recipe, method) for method in METHODS}}


def peak(recipe: Recipe, method: str) -> int:
    """Bytes of one process at the peak of a step."""
    config, _ = find_config(recipe.model)
    step = record_step(recipe, config, accumulating=False, method=make_method(recipe, method))
    return memory(step, "single", 1).peak_bytes


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    peaks = " | ".join(f"{row[method] / 1e9:.1f}" for method in METHODS)
    less = " | ".join(f"{100 * (row['neuroada'] / row[other] - 1):+.0f} %" for other in ("masked", "lora"))
    return f"| {row['model'].split('/')[-1]} | {row['shape']} | {peaks} | {less} |"


if __name__ == "__main__":
    main()
