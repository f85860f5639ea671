"""A whole model's training step on one GPU, method by method: peak memory beside the plan's, time, FLOPs.

    python benchmarks/full_size.py --model yahma/llama-7b-hf --batches 1x2048 4x512 16x512

The model's own configuration with random weights: neither a download nor data. Every method is alone on the device,
trains as much as NeuroAda does at k = 20 (full trains everything), and takes steps on batches of rows x tokens, all of
them full. Prints one table; --out writes the numbers as JSON.
"""

import argparse
import functools
import gc
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from neuroada.doctor.measured import Contender, Shape, peak_flops, rank_of
from neuroada.files import write_json
from neuroada.hf.config import find_config
from neuroada.methods import make_method
from neuroada.objectives import make_objective
from neuroada.planning.step import record_step
from neuroada.planning.strategies import memory
from neuroada.planning.traffic import step_flops
from neuroada.runs.formatting import format_bytes

METHODS = ("neuroada", "lora", "shira", "masked", "full")


def measured(shapes: list[Shape], name: str, repetitions: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """One method, alone on the device: a line for each shape. The model is made once."""
    config, contender = shapes[0].config(), None
    recipe = shapes[0].recipe()
    rank = rank_of(record_step(recipe, config, accumulating=False).trainable, recipe, shapes[0])
    for shape in shapes:
        recipe = shape.recipe(rank=rank)
        method = make_method(recipe, name)
        step = record_step(recipe, config, False, method)
        found: dict[str, Any] = {"method": name, "rows": shape.rows, "tokens": shape.tokens}
        found |= {"trainable": step.trainable, "planned bytes": memory(step, "single", 1).peak_bytes}
        try:
            contender = contender or Contender(shape, recipe, method, device)
            contender.batch = make_objective(recipe).longest_batch(config.vocab_size).to(device)
            found["peak bytes"] = contender.peak()
            seconds = [contender.step() for _ in range(repetitions)]
        except torch.OutOfMemoryError:
            if contender is not None:
                contender.optimizer.zero_grad()
            yield {**found, "peak bytes": None}
            continue
        found["seconds"] = statistics.median(seconds)
        found["tokens per second"] = shape.rows * shape.tokens / found["seconds"]
        if (most := peak_flops(device)) is not None:
            found["model FLOPs utilisation"] = step_flops(recipe, config, step) / found["seconds"] / most
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="yahma/llama-7b-hf", help="its configuration: a name of the hub, or a folder"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--batches", nargs="+", default=["4x512"], metavar="ROWSxTOKENS")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = Shape(args.model, device.type, functools.partial(_config, args.model), args.dtype, 1, 1, 1.0, 1.0)
    sizes = [tuple(map(int, batch.split("x"))) for batch in args.batches]
    shapes = [replace(one, rows=rows, tokens=tokens) for rows, tokens in sizes]
    results: list[dict[str, Any]] = []
    for name in args.methods:
        for found in measured(shapes, name, args.repetitions, device):
            results.append(found)
            print(found, flush=True)
            if args.out:
                told = {"model": args.model, "dtype": args.dtype, "device": _name(device), "torch": torch.__version__}
                write_json(args.out, {**told, "steps": results})
        gc.collect()
        torch.cuda.empty_cache()
    Console(width=140).print(table(f"{args.model}, {args.dtype}, {_name(device)}", results))


def table(title: str, results: list[dict[str, Any]]) -> Table:
    view = Table(title=title)
    for column in (
        "method",
        "batch",
        "trainable",
        "planned",
        "peak",
        "planned / peak",
        "step",
        "tokens/s",
        "FLOPs used",
    ):
        view.add_column(column, justify="left" if column == "method" else "right")
    for found in results:
        batch = f"{found['rows']} x {found['tokens']}"
        start = [found["method"], batch, f"{found['trainable']:,}", format_bytes(found["planned bytes"])]
        if found["peak bytes"] is None:
            view.add_row(*start, "out of memory")
            continue
        used = found.get("model FLOPs utilisation")
        view.add_row(
            *start,
            format_bytes(found["peak bytes"]),
            f"{found['planned bytes'] / found['peak bytes']:.3f}",
            f"{1e3 * found['seconds']:.1f} ms",
            f"{found['tokens per second']:,.0f}",
            "" if used is None else f"{100 * used:.0f} %",
        )
    return view


def _config(model: str) -> Any:
    return find_config(model)[0]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
