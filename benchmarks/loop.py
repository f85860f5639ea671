"""The whole training loop: packed against padded, label-only against full logits, and against TRL's SFTTrainer.

    pip install trl==1.16.0          # for this benchmark alone
    python benchmarks/loop.py --model models/smollm2-135m --data-dir data --task commonsense_15k --threads 2
    python benchmarks/loop.py --model models/smollm2-135m --data-dir data --task math --variants packed padded

packed      as recipes do by default: NeuroAda, a micro batch end to end, logits only where a label is
padded      the same, train.packing=false
full        packed, with the logits of every position, and autograd's cross-entropy over them
trl         SFTTrainer with PEFT LoRA r = 8 on the seven projections, prompt and completion, its defaults but for
            fp32 and no gradient checkpointing (none of the others has it either)

fp32, `--sequences` a step in one micro batch, drawn from the task's training file. Each variant runs in a process of
its own and the processes take turns, one step each, so that a disturbance hits all alike; peak memory is the process's
highest resident set on CPU, the allocator's peak on CUDA. The first step is not counted: it allocates. "ready" is the
time from the process's start to its first step; "collate" the share of a step spent on making its tensors.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits must not count as one that works

import torch
import torch.nn.functional as F

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = ["packed", "padded", "full", "trl"]


class Turns:
    """Waits for its turn before each step, and reports each step."""

    def __init__(self, pipe: Connection, device: torch.device, started: float) -> None:
        self.pipe, self.device, self.ready = pipe, device, time.time() - started

    def begin(self) -> bool:
        """Whether there is another step to take."""
        more = self.pipe.recv()
        self.clock, self.processor = time.perf_counter(), time.process_time()
        return more

    def end(self, tokens: int, collating: float | None = None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            status = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        seconds = time.perf_counter() - self.clock
        self.pipe.send({"seconds": seconds, "processor": time.process_time() - self.processor, "peak": peak,
                        "ready": self.ready, "tokens": tokens, "collating": collating})  # fmt: skip


def worker(pipe: Connection, variant: str, args: argparse.Namespace, folder: str, started: float) -> None:
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    (run_trl if variant == "trl" else run_own)(pipe, variant, args, folder, started)


def run_own(pipe: Connection, variant: str, args: argparse.Namespace, folder: str, started: float) -> None:
    """This project's loop, as neuroada/training/trainer.py has it, on one process."""
    from neuroada.config.recipe import Recipe
    from neuroada.data.mixing import Order
    from neuroada.engines.single import SingleEngine
    from neuroada.hf.loading import load_tokenizer
    from neuroada.objectives.cross_entropy import answer_loss
    from neuroada.objectives.micro_batch import collate
    from neuroada.tasks.data import load_examples
    from neuroada.tasks.encode import encode
    from neuroada.tasks.table import get_task
    from neuroada.training.builder import RecipeModelBuilder
    from neuroada.training.sample_order import share

    recipe = Recipe.model_validate(
        {
            "model": args.model,
            "task": args.task,
            "adapter": {"k": args.k, "target_modules": TARGETS},
            "optimizer": {"lr": 1e-4},
            "train": {"packing": variant != "padded", "dtype": "fp32", "micro_batch_size": args.micro or args.sequences,
                      "global_batch_size": args.sequences},
            "output_dir": folder,
            "provenance": "a benchmark",
        }
    )  # fmt: skip
    task = get_task(args.task)
    tokenizer = load_tokenizer(args.model)
    data = encode(load_examples(task, "train", args.data_dir), task, tokenizer, 512, cache_dir=Path(folder) / "tokens")
    engine = SingleEngine(recipe)
    model = engine.load(RecipeModelBuilder.of(recipe)).train()
    engine.start(model, recipe.micro_batches(1))
    turns = Turns(pipe, engine.device, started)
    step = 0
    while turns.begin():
        batch = Order((len(data),), recipe.train.seed).batch(step, args.sequences)
        answer_tokens = int(data.num_answer_tokens[batch].sum())
        tokens, collating = 0, 0.0
        for chosen in share(batch, data.lengths, 0, 1, recipe.train.micro_batch_size):
            before = time.perf_counter()
            micro = collate(data, chosen, recipe.train.packing, tokenizer.pad_token_id).to(engine.device)
            collating += time.perf_counter() - before
            tokens += micro.inputs["input_ids"].numel()
            loss = (full_logits_loss if variant == "full" else answer_loss)(engine.model, micro)
            engine.backward(loss / answer_tokens)
        engine.step(1e-4)
        step += 1
        turns.end(tokens, collating)


def full_logits_loss(model: Any, batch: Any) -> torch.Tensor:
    """What `answer_loss` computes, from the logits of every position."""
    inputs = dict(batch.inputs)
    columns = inputs.pop("logits_to_keep")
    targets = torch.full_like(inputs["input_ids"], -100)
    targets[:, columns] = batch.targets
    logits = model(**inputs, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def run_trl(pipe: Connection, variant: str, args: argparse.Namespace, folder: str, started: float) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from neuroada.tasks.data import load_examples
    from neuroada.tasks.table import get_task

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.turns = Turns(pipe, trainer.args.device, started)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.turns.begin():
                os._exit(0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.turns.end(0)

    task = get_task(args.task)
    examples = load_examples(task, "train", args.data_dir)
    random.Random(0).shuffle(examples)
    rows = [
        {"prompt": task.prompt(example), "completion": task.target(example)}
        for example in examples[: 4 * args.sequences * (args.steps + 1)]  # few: its preparation is not timed here
    ]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = SFTConfig(output_dir=folder, per_device_train_batch_size=args.sequences, max_length=512, bf16=False,
                       gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), report_to=[],
                       save_strategy="no", disable_tqdm=True, seed=42)  # fmt: skip
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[TakeTurns()],
    )
    trainer.train()


def run(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every variant's steps; one more goes before, uncounted."""
    found: dict[str, list[dict[str, float]]] = {}
    for together in [[variant] for variant in args.variants] if args.apart else [args.variants]:
        with tempfile.TemporaryDirectory() as folder:
            found |= take_turns(together, args, folder)
    return found


def take_turns(variants: list[str], args: argparse.Namespace, folder: str) -> dict[str, list[dict[str, float]]]:
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    pipes: dict[str, Connection] = {}
    processes = {}
    for variant in variants:
        pipes[variant], other = context.Pipe()
        started = time.time()
        processes[variant] = context.Process(target=worker, args=(other, variant, args, folder, started), daemon=True)
        processes[variant].start()
        other.close()
    for step in range(args.steps + 1):
        for variant, pipe in pipes.items():
            pipe.send(True)
            result = pipe.recv()
            if step:
                found[variant].append(result)
    for variant, pipe in pipes.items():
        pipe.send(False)
        processes[variant].join()  # then its memory is free
    return found


def summary(found: dict[str, list[dict[str, float]]], sequences: int) -> dict[str, dict[str, Any]]:
    """Rates from the sums over all steps, for steps differ in length; the peak of all; ratios to the first variant."""
    first = next(iter(found))

    def total(variant: str, field: str) -> float:
        return sum(result[field] for result in found[variant])

    table: dict[str, dict[str, Any]] = {}
    for variant, steps in found.items():
        table[variant] = {
            "examples_per_second": sequences * len(steps) / total(variant, "seconds"),
            "slower, clock": total(variant, "seconds") / total(first, "seconds"),
            "slower, processor": total(variant, "processor") / total(first, "processor"),
            "seconds_per_step": total(variant, "seconds") / len(steps),
            "processor_per_step": total(variant, "processor") / len(steps),
            "peak": max(result["peak"] for result in steps),
            "tokens_per_step": total(variant, "tokens") / len(steps) or None,
            "ready": steps[0]["ready"],
            "collate_share": None if steps[0]["collating"] is None
            else statistics.median(result["collating"] / result["seconds"] for result in steps),
        }  # fmt: skip
    return table


def show(table: dict[str, dict[str, Any]]) -> None:
    header = ["loop", "examples/s", "s a step", "processor s", f"time / {next(iter(table))}, clock", "processor",
              "peak, GB", "tokens a step", "ready, s", "collate"]  # fmt: skip
    print("|", " | ".join(header), "|")
    print("|", " | ".join(["---"] * len(header)), "|")
    for variant, row in table.items():
        tokens, collate = row["tokens_per_step"], row["collate_share"]
        cells = [variant, f"{row['examples_per_second']:.2f}", f"{row['seconds_per_step']:.2f}",
                 f"{row['processor_per_step']:.2f}", f"{row['slower, clock']:.2f}", f"{row['slower, processor']:.2f}",
                 f"{row['peak'] / 1e9:.2f}", "" if tokens is None else f"{tokens:.0f}", f"{row['ready']:.0f}",
                 "" if collate is None else f"{collate:.2%}"]  # fmt: skip
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--task", default="commonsense_15k", help="commonsense_15k, math, ...")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--sequences", type=int, default=16, help="a step")
    parser.add_argument("--micro", type=int, help="sequences of a micro batch, of all but trl (default: all of them)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--apart", action="store_true", help="one variant after the other: where memory is short")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    table = summary(run(args), args.sequences)
    if args.json:
        print(json.dumps(table))
        return
    print(f"{args.task}, {args.sequences} sequences a step, fp32, {args.threads} thread(s), {args.steps} steps, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    show(table)


if __name__ == "__main__":
    main()
