"""Score what a run has just trained, on the ranks that trained it."""

from pathlib import Path

import torch

from neuroada.environment import local_rank, rank
from neuroada.evaluation.chat_prompts import check_chat_prompts
from neuroada.evaluation.evaluate import evaluate_tasks
from neuroada.evaluation.load import load
from neuroada.evaluation.results import kept_scores, make_header, notes, table
from neuroada.evaluation.source import Source, resolve_tasks
from neuroada.tasks.data import load_examples


def check_tasks(names: list[str], data_dir: str, model: str) -> None:
    """Refuse unknown tasks, missing or malformed test files, and chat templates that fail, before anything is
    computed."""
    tasks = resolve_tasks(names)
    for task in tasks:
        load_examples(task, "test", data_dir)
    check_chat_prompts(tasks, model, "model = ")


def evaluate_trained(trained: Path, base: str, task: str, names: list[str], data_dir: str, limit: int | None) -> None:
    """Write results.json beside `trained` and print its table. Collective.

    Each rank loads the base whole and merges the adapter: generation from ZeRO-3's partitions is about ten times
    slower. A model too large for that is merged by `neuroada merge` and scored with `--backend vllm`.
    """
    source = Source.of_trained(trained, base)
    named = {"model": source.model, "adapter": str(source.adapter) if source.adapter else None}
    asked = resolve_tasks(names)
    there = kept_scores(trained.parent, make_header(named, source.identity(), limit), asked)
    # A score of more questions, made by hand since an earlier end of this run, stays.
    tasks = [
        task
        for task in asked
        if task.name not in there or there[task.name]["n"] <= len(load_examples(task, "test", data_dir)[:limit])
    ]
    if not tasks:
        return
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(source, "auto", torch.device(device))
    results = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        data_dir,
        trained.parent,
        limit=limit,
        names=named,
        trained_on=task,
        identity=source.identity(),
    )
    if rank() == 0:
        from rich.console import Console

        console = Console(markup=False, emoji=False)
        console.print(table(results))
        for note in notes(results):
            console.print(note)
