"""A training step of each method, side by side: time, processor time and peak memory.

    python benchmarks/step.py                                  # a 77M Llama, 4 x 256 tokens, fp32
    python benchmarks/step.py --size smollm2 --dtype bf16 --k 1 20 --methods frozen neuroada lora
    python benchmarks/step.py --threads 2 --repetitions 15 --json > step.json

Each method lives in a process of its own; the budgets follow each other, so that six processes or eight must fit the
memory (16 GB by default). The processes take turns, one step each and in a new order every repetition, so that a
disturbance hits all alike. Peak memory is that of another fresh process that takes two steps: the highest
resident set on CPU, with large blocks returned to the system when freed so that it counts what lives and not the heap's
holes (several hundred MB, of chance); the allocator's peak on CUDA. The table gives medians, quartiles, and the median
of the ratios to the frozen base and to LoRA with as many trained numbers, taken within each repetition. On a busy CPU
read the processor time: other work stretches the clock, and hardly that.

frozen: no method at all; its backward reaches the first norm, so it also computes the input gradients of the first
block's q, k and v, which no adapter needs: about 2 % of the 77M model's step. dense: a dense weight + delta for each
forward, by autograd (the textbook form of a sparse delta). masked: all target weights train, their gradients
multiplied by a mask. lora, shira, supertuning: PEFT's, of the rank or sparsity that trains as many numbers as NeuroAda
at k, and at least rank 1. Models are random.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits must not count as one that works

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "77m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PER_K = ["neuroada", "lora", "shira", "supertuning", "dense"]
METHODS = ["frozen", *PER_K, "masked", "full"]


def base_model(size: str, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 256, "tie_word_embeddings": True, "use_cache": False, **SIZES[size]})
    return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False).train()


def targets(model: nn.Module) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]  # type: ignore[misc]


class DenseDelta(nn.Module):
    """weight -> weight + a dense tensor of zeros with delta scattered into it."""

    def __init__(self, weight: torch.Tensor, k: int) -> None:
        super().__init__()
        self.register_buffer("idx", weight.abs().topk(k, 1).indices)
        self.delta = nn.Parameter(torch.zeros(len(weight), k, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + torch.zeros_like(weight).scatter(1, self.idx, self.delta)


def apply_method(model: nn.Module, method: str, k: int) -> nn.Module:
    """Attach what the method trains; with as many numbers as NeuroAda at k, where the method has a size."""
    import peft

    layers = targets(model)
    wanted = k * sum(layer.out_features for layer in layers)
    rank = max(1, round(wanted / sum(layer.in_features + layer.out_features for layer in layers)))
    if method == "frozen":
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    elif method == "neuroada":
        from neuroada import NeuroAdaConfig

        return peft.get_peft_model(model, NeuroAdaConfig(k=k, target_modules=TARGETS))
    elif method == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=TARGETS))
    elif method == "shira":
        return peft.get_peft_model(model, peft.ShiraConfig(r=rank, target_modules=TARGETS))
    elif method == "supertuning":
        sparsity = 1 - wanted / sum(layer.weight.numel() for layer in layers)
        return peft.get_peft_model(model, peft.SupertuningConfig(sparsity=sparsity, target_modules=TARGETS))
    elif method == "dense":
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", DenseDelta(layer.weight, k))
            layer.parametrizations.weight.original.requires_grad_(False)
    elif method == "masked":
        for layer in layers:
            mask = torch.zeros_like(layer.weight).scatter_(1, layer.weight.abs().topk(k, 1).indices, 1.0)
            layer.weight.requires_grad_(True).register_hook(mask.mul)
    elif method == "full":
        model.requires_grad_(True)
    return model


def memory_now(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")  # of this program alone; getrusage's would count its parent's


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def worker(pipe: Connection, method: str, k: int, args: argparse.Namespace) -> None:
    """One method's process: takes a step for each message, and answers with its times."""
    import peft  # noqa: F401 (so that its own memory counts as the base's)

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    model = base_model(args.size, DTYPES[args.dtype], args.device)
    base = memory_now(args.device)
    model = apply_method(model, method, k)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows, length = args.batch
    ids = torch.randint(0, 256, (rows, length), device=args.device)

    def now() -> tuple[float, float]:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    while pipe.recv():
        marks = [now()]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        del logits
        marks.append(now())
        loss.backward()
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now())
        clock, processor = zip(*marks, strict=True)
        pipe.send(
            {
                "forward": clock[1] - clock[0],
                "backward": clock[2] - clock[1],
                "step": clock[3] - clock[0],
                "processor": processor[3] - processor[0],
                "peak": peak_memory(args.device),
                "base": base,
                "trained": sum(param.numel() for param in trained),
            }
        )


def start(method: str, k: int, args: argparse.Namespace) -> Connection:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=worker, args=(other, method, k, args), daemon=True).start()
    other.close()
    return pipe


def memory(method: str, k: int, args: argparse.Namespace) -> dict[str, float]:
    """peak and base of a fresh process; base: with the model built, before the method is attached."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    pipe = start(method, k, args)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    for _ in range(2):
        pipe.send(True)
        result = pipe.recv()
    pipe.send(False)
    return {field: result[field] for field in ("peak", "base")}


def run(args: argparse.Namespace, k: int) -> dict[str, list[dict[str, float]]]:
    """The measurements of each method at budget `k`, one a repetition; two steps each go before, unmeasured."""
    last = k == args.k[-1]
    methods = [method for method in args.methods if method in ("frozen", *PER_K) or last]
    peaks = {method: memory(method, k, args) for method in methods}
    pipes = {method: start(method, k, args) for method in methods}
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for repetition in range(args.repetitions + 2):
        for method in random.sample(methods, len(methods)):
            pipes[method].send(True)
            result = pipes[method].recv()
            if repetition >= 2:
                found[method].append({**result, **peaks[method]})
    for pipe in pipes.values():
        pipe.send(False)
    return found


def summary(found: dict[str, list[dict[str, float]]], tokens: int) -> dict[str, dict[str, Any]]:
    """Medians, quartiles of the step, and median ratios within a repetition to the frozen base and to LoRA."""

    def ratio(label: str, other: str, field: str) -> float | None:
        if other not in found:
            return None
        pairs = zip(found[label], found[other], strict=True)
        return statistics.median(mine[field] / theirs[field] for mine, theirs in pairs)

    table: dict[str, dict[str, Any]] = {}
    for label, results in found.items():
        row: dict[str, Any] = {
            field: statistics.median(result[field] for result in results)
            for field in ("forward", "backward", "step", "processor")
        }
        steps = [result["step"] for result in results]
        row["quartiles"] = statistics.quantiles(steps, n=4)[::2] if len(steps) > 1 else steps * 2
        for field in ("step", "processor"):
            row[f"{field}/frozen"] = ratio(label, "frozen", field)
            row[f"{field}/lora"] = ratio(label, "lora", field)
        row |= {field: results[-1][field] for field in ("peak", "base", "trained")}
        row["tokens_per_second"] = tokens / row["step"]
        table[label] = row
    return table


def show(table: dict[str, dict[str, Any]]) -> None:
    header = ["method", "trained", "step, ms", "quartiles", "forward", "backward", "processor", "/ frozen, clock",
              "processor", "/ LoRA, clock", "processor", "peak, MB", "above base, MB", "tokens/s"]  # fmt: skip
    print("|", " | ".join(header), "|")
    print("|", " | ".join(["---"] * len(header)), "|")
    for label, row in table.items():
        low, high = row["quartiles"]
        ratios = [row[f"{field}/{to}"] for to in ("frozen", "lora") for field in ("step", "processor")]
        cells = [label, f"{row['trained']:,}", f"{1e3 * row['step']:.0f}", f"{1e3 * low:.0f}-{1e3 * high:.0f}",
                 *(f"{1e3 * row[field]:.0f}" for field in ("forward", "backward", "processor")),
                 *("" if value is None else f"{value:.2f}" for value in ratios),
                 f"{row['peak'] / 1e6:.0f}", f"{(row['peak'] - row['base']) / 1e6:.0f}",
                 f"{row['tokens_per_second']:.0f}"]  # fmt: skip
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="77m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split("x")], default=[4, 256], help="4x256")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 20], help="masked, full: beside the last one")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tables = {k: summary(run(args, k), args.batch[0] * args.batch[1]) for k in args.k}
    if args.json:
        print(json.dumps(tables))
        return
    rows, length = args.batch
    print(f"{args.size}, {rows} x {length} tokens, {args.dtype}, {args.device}, {args.threads} thread(s), "
          f"{args.repetitions} repetitions, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for k, table in tables.items():
        print(f"\nk = {k}\n")
        show(table)


if __name__ == "__main__":
    main()
