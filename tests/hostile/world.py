"""A small world to attack: a model, data, a run with checkpoint, adapter and scores, a merged model, a selection."""

import json
import shutil
from pathlib import Path

from judge import run_command
from safetensors.torch import load_file, save_file
from submission import make_slurm

from neuroada.comparison.page import write_comparison
from neuroada.comparison.summary import summarize
from neuroada.sources.tiny import make_tiny

TRAIN = ["engine.name=single", "train.max_steps=2", "train.global_batch_size=2", "checkpoint.every_steps=1"]


def make_world(folder: Path) -> Path:
    """Every part made by the project's own commands."""
    folder.mkdir(parents=True)
    make_tiny(folder / "model", hidden=16)
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.norm.weight"].zero_()  # all logits are 0: the first token, the end of text, is generated at once
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    rows, tests = (
        [
            {"instruction": f"What is {n} + {n}?", "input": "", "output": f"{2 * n}", "answer": f"{2 * n}"}
            for n in range(first, first + 6)
        ]
        for first in (1, 5)
    )
    for name, split, content in (("math_10k", "train", rows), ("AddSub", "test", tests)):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / f"{split}.json").write_text(json.dumps(content))
    make_slurm(folder)
    recipe = {
        "model": "model", "task": "math", "adapter": {"k": 2, "target_modules": ["q_proj", "down_proj"]},
        "optimizer": {"lr": 0.01}, "train": {"max_length": 300, "dtype": "fp32", "micro_batch_size": 1},
        "evaluate": {"tasks": []}, "output_dir": "run", "provenance": "none",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    ok(folder, "train", "--recipe", "recipe.yaml", *TRAIN)
    ok(folder, "evaluate", "--adapter", "run/adapter", "--tasks", "AddSub")
    ok(folder, "merge", "--adapter", "run/adapter", "--out", "merged")
    ok(folder, "select", "--model", "model", "--k", "2", "--target-modules", "q_proj", "down_proj", "--out",
       "selection.safetensors", "--workers", "1")  # fmt: skip
    shutil.copytree(folder / "run" / "adapter", folder / "adapter")
    ok(folder, "export", "--as", "shira", "--adapter", "adapter", "--out", "exported")
    own = {
        **recipe,
        "data": {"datasets": [{"path": "rows.jsonl", "ignore_columns": ["answer"]}], "validation": {"size": 2}},
        "output_dir": "own",
    }
    (folder / "own.yaml").write_text(json.dumps({name: value for name, value in own.items() if name != "task"}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok(folder, "train", "--recipe", "own.yaml", *TRAIN)
    make_comparison(folder / "compared")
    return folder


def make_comparison(folder: Path) -> None:
    """A comparison's folder, of runs that were measured."""
    for method in ("neuroada", "lora"):
        for seed, loss in ((1, 0.5), (2, 0.75)):
            run = folder / "runs" / method / f"lr-0.1-seed-{seed}"
            run.mkdir(parents=True)
            result = {"recipe": {"optimizer": {"lr": 0.1}, "train": {"seed": seed}}, "test": loss, "validation": loss,
                      "tasks": {"AddSub": {"sound": loss}}, "step_seconds": 0.1}  # fmt: skip
            (run / "result.json").write_text(json.dumps(result))
            lines = [{"step": step, "loss": loss, "lr": 0.1, "tokens_per_second": 1.0, "peak_memory_bytes": 1}
                     for step in (1, 2)]  # fmt: skip
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = {method: {"lr": 0.1, "tries": {"0.1": 0.5, "1": None}} for method in ("neuroada", "lora")}
    write_comparison(folder, summarize(folder, chosen, [1, 2], task="math", model="model", command="neuroada compare"))


def ok(folder: Path, *command: str) -> None:
    done = run_command(command[0], list(command[1:]), folder)
    assert done.status == 0, done.said
