"""Held-out loss after the same short training over an unquantised base, NF4, int8 and fp8, and of QLoRA beside them.

    python benchmarks/quantised_quality.py --out runs/quality --seeds 1 2 3 --steps 100 --dataset '{path: train.jsonl}'
    python benchmarks/quantised_quality.py --out runs/quality ... --entries nf4 qlora   # some rows alone

Every run is the project's own, of the recipe smollm2_chat with other fields: the same examples in the same order, the
same schedule, the loss of the same held-out examples. --override sets further fields of it.

unquantised: as the files are, in train.dtype (the recipe's fp32; on a GPU, --override train.dtype=bf16). nf4, int8,
fp8: with the k largest entries of each row exact, as recipes have it; nf4-plain: with none. qlora: PEFT's LoRA over
bitsandbytes' NF4 with nested scales, at the rank that trains nearest to as many parameters as k does. Methods have
learning rates of their own: with several, each has its row, and the reader chooses.

A run that is finished is not repeated, one that was interrupted goes on from its checkpoint. Writes OUT/results.json
and prints the table.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

from neuroada.cli.command import Parser, run
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.errors import UserError
from neuroada.files import read_json, write_json
from neuroada.hf.config import find_config
from neuroada.methods import make_method
from neuroada.methods.lora import Lora
from neuroada.objectives import make_objective
from neuroada.planning.budget import Budget, match
from neuroada.planning.meta_model import on_meta
from neuroada.tasks.validation_file import read_measured
from neuroada.training.signals import StopRequest
from neuroada.training.trainer import Trainer

BASES = {
    "unquantised": [],
    "nf4": ["base.model_dtype=nf4"],
    "nf4-plain": ["base.model_dtype=nf4", "base.exact=0"],
    "int8": ["base.model_dtype=int8"],
    "fp8": ["base.model_dtype=fp8"],
}
ENTRIES = (*BASES, "qlora")


class QLora(Lora):
    """LoRA over the Linear layers of the blocks in bitsandbytes' NF4, block size 64, nested scales."""

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        base: Any = model
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and any(part.isdigit() for part in name.split(".")):
                base.set_submodule(name, in_nf4(module))
        base.is_loaded_in_4bit = True  # by which PEFT knows its layer for them
        return super().attach(model, task_type)


def in_nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    weight = linear.weight.data
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True, module=layer
    )
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False  # in eval mode it would repack its weight, for good (0.50)
    return layer.to(weight.device)  # type: ignore[no-any-return]


def recipe_of(args: argparse.Namespace, entry: str, lr: float, seed: int) -> Recipe:
    method = ["adapter.method=lora"] if entry == "qlora" else [f"adapter.k={args.k}", *BASES[entry]]
    fields = [
        f"model={args.model}",
        f"data.datasets=[{args.dataset}]",
        f"data.validation.size={args.validation}",
        f"train.max_steps={args.steps}",
        f"train.seed={seed}",
        f"optimizer.lr={lr!r}",
        "train.epochs=1000",  # max_steps ends a run
        "engine.name=single",
        f"evaluate.every_steps={args.steps}",
        "evaluate.samples=0",
        "evaluate.early_stopping_patience=null",
        "checkpoint.keep=1",
        f"output_dir={args.out / f'{entry}-lr-{lr:g}-seed-{seed}'}",
    ]
    return load_recipe("smollm2_chat", [*fields, *method, *args.override])


def matched_rank(args: argparse.Namespace) -> int:
    """The rank at which LoRA trains nearest to as many parameters as NeuroAda at k."""
    recipe = recipe_of(args, "unquantised", 1e-3, 0)
    config, _ = find_config(recipe.model)
    method = make_method(recipe)
    budget = method.trainable(on_meta(config, recipe, method, make_objective(recipe)))
    return int(match(recipe_of(args, "qlora", 1e-3, 0), Budget(f"trainable={budget}", number=budget))["rank"])


def one(recipe: Recipe, entry: str, lr: float) -> dict[str, Any]:
    """The result of a run: read if it is there, else trained."""
    folder, asked = Path(recipe.output_dir), recipe.identity()
    file = folder / "result.json"
    if file.is_file():
        result: dict[str, Any] = read_json(file)
        if result.get("recipe") != asked:
            raise UserError(f"--out: {folder} holds a run of other fields than are asked for; choose another folder")
        return result
    print(f"== {folder}", file=sys.stderr, flush=True)
    started = time.monotonic()
    with StopRequest() as stop:
        trainer = Trainer(recipe, stop)
        if entry == "qlora":
            trainer.method = QLora(recipe)
        trainer.run()
    measured = read_measured(folder / "validation.json")
    result = {
        "entry": entry,
        "lr": lr,
        "seed": recipe.train.seed,
        "before": measured[0]["loss"],
        "after": measured[-1]["loss"],
        "trainable": trainer.method.trainable(trainer.model),
        "bytes": sum(param.numel() * param.element_size() for param in trainer.model.parameters()),
        "seconds": round(time.monotonic() - started, 1),  # since the last start
        "recipe": asked,
    }
    write_json(file, result)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """A row for each entry and learning rate, its loss over the seeds."""
    lines = [
        "| base | lr | trainable | model, MB | loss before | after, mean | deviation | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((result["entry"], result["lr"]), []).append(result)
    for (entry, lr), found in rows.items():
        after = [result["after"] for result in found]
        deviation = f"{statistics.stdev(after):.4f}" if len(after) > 1 else ""
        seeds = " ".join(str(result["seed"]) for result in found)
        lines.append(
            f"| {entry} | {lr:g} | {found[0]['trainable']:,} | {found[0]['bytes'] / 1e6:.0f} | "
            f"{statistics.mean(result['before'] for result in found):.4f} | {statistics.mean(after):.4f} | {deviation} "
            f"| {seeds} |"
        )
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="quantised_quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", required=True, help="one of data.datasets, as a recipe has it")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=ENTRIES)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--validation", type=int, default=200, help="examples held out")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3], help="of NeuroAda")
    parser.add_argument("--qlora-lrs", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--override", nargs="+", default=[], metavar="FIELD=VALUE", help="of every run's recipe")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if "qlora" in args.entries and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--entries qlora: bitsandbytes is not installed; pip install -c requirements.txt bitsandbytes, or choose "
            f"among {', '.join(BASES)}"
        )
    results = []
    rank = matched_rank(args) if "qlora" in args.entries else 0
    for seed in args.seeds:
        for entry in args.entries:
            for lr in args.qlora_lrs if entry == "qlora" else args.lrs:
                recipe = recipe_of(args, entry, lr, seed)
                if entry == "qlora":
                    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": rank})})
                results.append(one(recipe, entry, lr))
                write_json(args.out / "results.json", {"results": results})
    print(table(results))


if __name__ == "__main__":
    run(main)
