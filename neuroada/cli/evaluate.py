"""Score a model or an adapter on tasks: results.json, a table, and every prediction beside its score.

    neuroada evaluate --adapter runs/llama7b_math/adapter --tasks math
    torchrun --nproc-per-node 8 launch/evaluate.py --model models/llama-7b --tasks AddSub,gsm8k --limit 100
    neuroada evaluate --adapter runs/roberta_base_sst2/adapter --tasks glue/sst2

A classifier is scored as its run scored it: on the same part of the validation split, in the run's dtype.
Cut off? The same command goes on where it stopped.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from neuroada.environment import joining, local_rank, rank, world_size
from neuroada.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter; merged into its base in memory")
    parser.add_argument("--model", metavar="DIR", help="an ordinary checkpoint")
    parser.add_argument("--base-model", metavar="DIR", help="the adapter's base, if not where adapter_config.json says")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="tasks, suites (math), task files, lm_eval:NAME")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="holds <task>/test.json (default: data)")
    parser.add_argument("--out", metavar="DIR", help="default: the adapter's run, else results/<name>")
    parser.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="tokens in the cache at once")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as saved; CPU: fp32")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--json", action="store_true", help="print results.json instead of a table")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    from neuroada.evaluation.chat_prompts import check_chat_prompts
    from neuroada.evaluation.source import Source, find_tasks
    from neuroada.tasks.data import load_examples
    from neuroada.tasks.table import HARNESS

    for field in ("limit", "batch_tokens"):
        value = getattr(arguments, field)
        if value is not None and value < 1:
            raise UserError(f"{field.replace('_', '-')}: {value} is not allowed; give at least 1")
    source = Source.from_arguments(arguments.model, arguments.adapter, arguments.base_model)
    tasks = find_tasks(arguments.tasks.split(","))
    classified = [task for task in tasks if task.objective == "classification"]
    if classified and (len(tasks) > 1 or arguments.backend == "vllm"):
        raise UserError(f"tasks: a classifier of {classified[0].name} is scored on that task alone, by --backend hf")
    for task in tasks:
        # an error in the data shows before a model is loaded
        load_examples(task, "validation" if classified else "test", arguments.data_dir)
    check_chat_prompts(tasks, source.model, "model: " if source.adapter is None else "base-model: ")
    ranks = world_size()
    if arguments.backend == "vllm" and find_spec("vllm") is None:
        raise UserError("backend: vllm is not installed; pip install vllm, or give --backend hf")
    by_hf = [task.name for task in tasks if task.multiple_choice or task.name.startswith(HARNESS)]
    if arguments.backend == "vllm" and by_hf:
        raise UserError(f"backend: vllm only generates answers, and {by_hf[0]} needs more; give --backend hf")
    if arguments.backend == "vllm" and ranks > 1:
        raise UserError(f"backend: vllm starts its own workers, not {ranks} ranks; run it without a launcher")
    if ranks > 1:  # before torch starts its threads
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks) or 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, local))))

    from neuroada.evaluation.results import notes, table, to_json

    if classified:
        from neuroada.evaluation.classify import evaluate_classifier
        from neuroada.objectives.epoch_validation import table

        with joined(ranks):
            results, out = evaluate_classifier(source, classified[0], arguments)
    else:
        results, out = evaluate(arguments, source, tasks, ranks), Path(arguments.out or source.default_out())
    if rank() != 0:
        return
    refresh_report(out)
    if arguments.json:
        print(to_json(results), end="")
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    console.print(table(results))
    for note in notes(results):
        console.print(note)
    console.print(f"written to {out}")


def refresh_report(out: Path) -> None:
    """Show the new scores in report.html of the run they belong to: `out` is its folder, or base/ in it."""
    from neuroada.reporting import write_report

    for folder in (out, out.parent):
        if (folder / "metrics.jsonl").is_file() and (folder / "recipe.yaml").is_file():
            write_report(folder)
            return


def evaluate(arguments: argparse.Namespace, source, tasks, ranks: int) -> dict:
    """Load the model and score it; with several ranks, each in its own process."""
    import torch

    from neuroada.evaluation.evaluate import evaluate_backend, evaluate_tasks
    from neuroada.evaluation.load import load

    options = {
        "limit": arguments.limit,
        "names": {"model": source.model, "adapter": str(source.adapter) if source.adapter else None},
        "trained_on": source.trained_on,
        "identity": source.identity(),
    }
    where = (arguments.data_dir, arguments.out or source.default_out())
    if arguments.backend == "vllm":
        from neuroada.evaluation.vllm_backend import VllmBackend
        from neuroada.hf.loading import load_tokenizer

        with VllmBackend(source, arguments.dtype) as backend:
            return evaluate_backend(backend, load_tokenizer(source.model, "model: "), tasks, *where, **options)

    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(source, arguments.dtype, torch.device(device))
    with joined(ranks):
        return evaluate_tasks(model, tokenizer, tasks, *where, batch_tokens=arguments.batch_tokens, **options)


@contextmanager
def joined(ranks: int) -> Iterator[None]:
    """The ranks know each other meanwhile, over gloo: barriers and a classifier's scores travel, no model does."""
    import torch.distributed as dist

    if ranks > 1:
        with joining():
            dist.init_process_group("gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
