"""Compare methods on one task: a learning rate chosen for each with the same number of tries, then seeds, one table.

python launch/compare.py --recipe quickstart --methods neuroada:k=20 lora:rank=8 shira:rank=8 full@1e-5,3e-5,1e-4 \\
    --lrs 1e-3,3e-3,1e-2 --seeds 1,2,3 --validation 200 --out runs/compare train.max_steps=100

A method is name[:field=value,...][@rate,...]: fields of the recipe's adapter section, and learning rates of its own.
--validation N keeps 2 x N questions of the training set out of every run: N to choose the rate by, N to report. The
rates are tried with the first seed. Every run is a fresh process and a folder; the same command goes on where it was.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroada.command import run
from neuroada.errors import Preempted, UserError
from neuroada.reporting.comparison import folder_of
from neuroada.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
EXAMPLE = "such as neuroada:k=20 or full@1e-5,3e-5"


@dataclass(frozen=True)
class Method:
    label: str  # as given, without its rates
    overrides: tuple[str, ...]
    lrs: tuple[float, ...]

    def recipe(self, args: argparse.Namespace, lr: float, seed: int) -> Recipe:
        folder = Path(args.out) / "runs" / folder_of(self.label) / f"lr-{lr:g}-seed-{seed}"
        return load_recipe(
            args.recipe,
            [
                *args.overrides,
                *self.overrides,
                f"optimizer.lr={lr!r}",
                f"train.seed={seed}",
                f"train.held_out={args.validation}",
                f"output_dir={folder}",
            ],
        )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a YAML file")
    parser.add_argument("--methods", required=True, nargs="+", metavar="METHOD", help=EXAMPLE)
    parser.add_argument("--lrs", default="", metavar="A,B", help="learning rates to try, of methods without their own")
    parser.add_argument("--seeds", default="42", metavar="A,B", help="one run each at the chosen rate (default: 42)")
    parser.add_argument(
        "--validation", type=int, default=0, metavar="N", help="questions to choose by; as many to report"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the comparison's folder")
    parser.add_argument("--launcher", default=sys.executable, help="such as 'torchrun --nproc-per-node 8'")
    parser.add_argument("--keep", action="store_true", help="keep every run's checkpoints and whole models")
    parser.add_argument("--json", action="store_true", help="print comparison.json instead of a table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run, such as train.max_steps=50")
    return parser.parse_args(argv)


def numbers(field: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{field} = {text}: must be numbers with commas between them") from None


def read_methods(args: argparse.Namespace) -> list[Method]:
    """Every method with its rates: the same number for each, or the comparison would favour one."""
    default = numbers("--lrs", args.lrs, float)
    methods = []
    for spec in args.methods:
        label, _, own = spec.partition("@")
        name, _, fields = label.partition(":")
        lrs = numbers(f"--methods {spec}", own, float) or default
        if not lrs:
            raise UserError(f"--methods {spec}: has no learning rate; give --lrs, or {spec}@1e-3,3e-3")
        overrides = [f"adapter.method={name}", *(f"adapter.{field}" for field in fields.split(",") if field)]
        methods.append(Method(label, tuple(overrides), tuple(lrs)))
    counts = {method.label: len(method.lrs) for method in methods}
    if len(counts) < len(methods):
        raise UserError(f"--methods {' '.join(args.methods)}: names a method twice")
    if len(set(counts.values())) > 1:
        raise UserError(f"--methods: every method must have as many learning rates to try; here {counts}")
    return methods


def main(argv: list[str]) -> None:
    if argv[:1] == ["--measure"]:  # a child of the same command
        return measure(Path(argv[1]), argv[2] == "base")
    args = parse(argv)
    methods, seeds = read_methods(args), numbers("--seeds", args.seeds, int)
    if not seeds:
        raise UserError("--seeds: names no seed; give some, such as --seeds 1,2,3")
    recipes = [method.recipe(args, lr, seed) for method in methods for lr in method.lrs for seed in seeds]
    from neuroada.tasks.table import get_task

    if args.validation < 1 and not get_task(recipes[0].task).num_labels:
        raise UserError(f"--validation {args.validation}: give the number of questions to choose the learning rate by")

    chosen: dict[str, dict[str, Any]] = {}
    base = Method("base", (), (0.0,)).recipe(args, recipes[0].optimizer.lr, 0)
    one(base.model_copy(update={"output_dir": str(Path(args.out) / "runs" / "base")}), args, base=True)
    for method in methods:
        tries = {lr: one(method.recipe(args, lr, seeds[0]), args)["choose"] for lr in method.lrs}
        best = min(tries, key=lambda lr: math.inf if tries[lr] is None else tries[lr])
        if tries[best] is None:
            raise UserError(
                f"--methods {method.label}: diverged at every learning rate of {list(tries)}; try lower ones"
            )
        chosen[method.label] = {"lr": best, "tries": {f"{lr:g}": tries[lr] for lr in method.lrs}}
        for seed in seeds[1:]:
            one(method.recipe(args, best, seed), args)
    command = shlex.join(["python", "launch/compare.py", *argv])
    conclude(Path(args.out), recipes[0], chosen, seeds, command, args)


def conclude(
    out: Path, recipe: Recipe, chosen: dict[str, Any], seeds: list[int], command: str, args: argparse.Namespace
) -> None:
    """Write comparison.json and report.html, print the table."""
    from neuroada.reporting.comparison import summarize, table, write_comparison

    summary = summarize(out, chosen, seeds, task=recipe.task, model=recipe.model, command=command)
    write_comparison(out, summary)
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    from rich.console import Console

    Console().print(table(summary))
    print(f"report: {out / 'report.html'}")


def one(recipe: Recipe, args: argparse.Namespace, base: bool = False) -> dict[str, Any]:
    """The result of one run: read if it is there, else trained and measured, each in a process of its own."""
    folder = Path(recipe.output_dir)
    result_file, asked = folder / "result.json", deciding(recipe, base)
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        for field in asked:
            if result["recipe"].get(field) != asked[field]:
                raise UserError(
                    f"--out {args.out}: {folder.relative_to(args.out)} was run with {field} = "
                    f"{result['recipe'].get(field)}, not {asked[field]}; choose another folder"
                )
        return result
    print(f"== {folder.relative_to(args.out)}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "asked.yaml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if not base:
        command = [*shlex.split(args.launcher), str(HERE / "train.py"), "--recipe", str(folder / "asked.yaml")]
        trained, said = follow(command, environment, folder / "train.log")
        last = next((line for line in reversed(said.splitlines()) if line.startswith("error: ")), "")
        if trained == 75:
            raise Preempted("stopped during a run; run the same command to go on")
        if trained and "gradient norm" in last:  # a rate too high for the method: a result, not a mistake
            result = {"recipe": asked, "diverged": last.removeprefix("error: "), "choose": None}
            result_file.write_text(json.dumps(result, indent=1) + "\n")
            return result
        if trained == 2:
            raise UserError(last.removeprefix("error: "))
        if trained:
            raise RuntimeError(f"{shlex.join(command)}: exit {trained}\n{said[-4000:]}")
    command = [sys.executable, str(HERE / "compare.py"), "--measure", str(folder), "base" if base else "run"]
    measured, said = follow(command, environment, folder / "measure.log")
    if measured:
        raise RuntimeError(f"{shlex.join(command)}: exit {measured}\n{said[-4000:]}")
    if not args.keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "model", ignore_errors=True)
    return json.loads(result_file.read_text())


def deciding(recipe: Recipe, base: bool) -> dict[str, Any]:
    """The fields that two runs must share to be one; the base model's are those it is measured by."""
    if not base:
        return recipe.model_dump(exclude={"output_dir"})
    measured_by = recipe.model_dump(include={"model", "task", "data_dir", "evaluate"})
    return {**measured_by, "train": recipe.train.model_dump(include={"held_out", "max_length"})}


def follow(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, str]:
    """Run a command, all it prints into `log`; its exit status, and what it printed."""
    with log.open("w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return done.returncode, log.read_text(errors="replace")


def measure(folder: Path, base: bool) -> None:
    """Write `folder`/result.json: losses on the parts held out, accuracies, sizes, times; of the merged model."""
    from neuroada.tasks.table import get_task

    recipe = load_recipe(str(folder / "asked.yaml"))
    task = get_task(recipe.task)
    result: dict[str, Any] = {"recipe": deciding(recipe, base)}
    if not base:
        result |= costs(folder)
        scored = folder / "results.json"  # the run has scored itself, on all its ranks
        if scored.is_file():
            result["tasks"] = json.loads(scored.read_text())["tasks"]
    if not task.num_labels:
        result |= losses(folder, recipe, base)
    elif base:
        result["choose"] = None
    else:
        entry = result["tasks"][task.name]
        result |= {"choose": entry["choose"]["loss"], "report": entry["loss"]}
    partial = folder / ".result.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(folder / "result.json")


def losses(folder: Path, recipe: Recipe, base: bool) -> dict[str, Any]:
    """What loading the model shows: losses on the parts held out; what merging costs; accuracies of the base."""
    import torch

    import neuroada.adapter  # noqa: F401 (PEFT knows the method from here on)
    from neuroada.evaluation.arguments import Source, resolve_tasks
    from neuroada.evaluation.evaluate import evaluate_tasks
    from neuroada.evaluation.load import load
    from neuroada.tasks.data import load_examples
    from neuroada.tasks.encode import encode
    from neuroada.tasks.table import get_task
    from neuroada.training.held_out import hold_out, mean_answer_loss

    result: dict[str, Any] = {}
    task = get_task(recipe.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = (folder / "model").is_dir()
    source = Source(str(folder / "model") if whole else recipe.model, None if base or whole else folder / "adapter")
    model, tokenizer = load(source, "auto", device)
    _, *parts = hold_out(load_examples(task, "train", recipe.data_dir), recipe.train.held_out)
    for name, part in zip(("choose", "report"), parts, strict=True):
        data = encode(part, task, tokenizer, recipe.train.max_length)
        result[name] = mean_answer_loss(model, data, tokenizer.pad_token_id or 0)
    if not base:
        result["merged_cost"] = merged_cost(model, load(Source(recipe.model), "auto", device)[0])
    elif recipe.evaluate.tasks:
        scored = evaluate_tasks(
            model, tokenizer, resolve_tasks(recipe.evaluate.tasks), recipe.data_dir, folder,
            limit=recipe.evaluate.limit, trained_on=recipe.task, identity=source.identity(),
        )  # fmt: skip
        result["tasks"] = scored["tasks"]
    return result


def costs(folder: Path) -> dict[str, Any]:
    """What the run's own files say of its cost. Peak memory is before any checkpoint or adapter is written."""
    from statistics import median

    facts = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settled = [line["step_seconds"] for line in lines if line["step"] > 3]  # the first ones also compile and allocate
    saved = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return {
        "trainable": facts["trainable"],
        "parameters": facts["parameters"],
        "device": facts["device"],
        "world_size": facts["world_size"],
        "final_loss": lines[-1]["loss"],
        "step_seconds": median(settled) if settled else None,
        "peak_memory_bytes": lines[-1]["peak_memory_bytes"],
        "saved_bytes": sum(file.stat().st_size for file in saved),
    }


def merged_cost(merged: "PreTrainedModel", base: "PreTrainedModel", repeats: int = 9) -> float:
    """Median time of a forward pass of 64 tokens after merging, as a multiple of the base model's, in turns."""
    from statistics import median
    from time import perf_counter

    import torch

    ids = torch.arange(64, device=base.device)[None] % base.config.get_text_config().vocab_size
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for is_merged, model in ((True, merged), (False, base)):
                started = perf_counter()
                model(ids).logits[0, -1, 0].item()  # waits for the device
                times[is_merged].append(perf_counter() - started)
    return median(times[True][1:]) / median(times[False][1:])


if __name__ == "__main__":
    run(main)
