"""Serving with adapters: a mixed batch, swapping, decoding, beside PEFT's LoRA, in one run.

    python benchmarks/serving.py --model models/smollm2-135m --threads 2

mixed: a batch of `--rows` prompts for 8 adapters, as a multiple of the same batch for one adapter. swap: another
adapter's file in the place of a loaded one; the same for one layer of LLaMA-7B's shapes. decode: tokens/s of greedy
decoding for one sequence, the prompt's own pass left out, with the adapter active and unmerged. Base, NeuroAda and LoRA
take turns; medians of the ratios within a turn. LoRA has the rank that trains as many parameters.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits must not count as one that works

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as swap_lora
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig, hotswap_adapter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = [f"adapter{number}" for number in range(8)]


def load(args: argparse.Namespace) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()


def configurations(base: nn.Module, k: int) -> dict[str, NeuroAdaConfig | LoraConfig]:
    layers = [module for name, module in base.named_modules() if name.rpartition(".")[2] in TARGETS]
    wanted = k * sum(layer.out_features for layer in layers)
    rank = max(1, round(wanted / sum(layer.in_features + layer.out_features for layer in layers)))
    return {
        "neuroada": NeuroAdaConfig(k=k, target_modules=TARGETS),
        "lora": LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False),
    }


def tuned(base: nn.Module, config: NeuroAdaConfig | LoraConfig, adapters: list[str]) -> PeftModel:
    model = get_peft_model(base, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for name, param in model.named_parameters():
        if "neuroada_delta" in name:
            param.data.normal_(std=1e-3)
    return model.eval()


def take_turns(runs: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Seconds of each run, once a turn, in a new order every turn; the first turn is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in random.sample([*runs], len(runs)):
            seconds = runs[name]()
            if turn:
                found[name].append(seconds)
    return found


def ratio(found: dict[str, list[float]], mine: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(found[mine], found[other], strict=True))


@torch.no_grad()
def forward_seconds(model: nn.Module, ids: torch.Tensor, **options: object) -> float:
    start = time.perf_counter()
    model(input_ids=ids, **options)
    return time.perf_counter() - start


@torch.no_grad()
def decode_seconds(model: nn.Module, ids: torch.Tensor, new: int) -> float:
    """Of a token, after the prompt's pass."""
    past = model(input_ids=ids, use_cache=True)
    token = past.logits[:, -1:].argmax(-1)
    cache = past.past_key_values
    start = time.perf_counter()
    for _ in range(new):
        step = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
    return (time.perf_counter() - start) / new


def swap_seconds(model: PeftModel, folder: Path, swap: Callable[..., None]) -> float:
    start = time.perf_counter()
    swap(model, str(folder), ADAPTERS[0], torch_device="cpu")
    return time.perf_counter() - start


def swap(models: dict[str, PeftModel], turns: int) -> dict[str, float]:
    """Method -> median milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(Path(folder) / name, selected_adapters=[ADAPTERS[1]])
        files = {name: Path(folder) / name / ADAPTERS[1] for name in models}
        swaps = {"neuroada": hotswap_adapter, "lora": swap_lora}
        runs = {name: lambda n=name: swap_seconds(models[n], files[n], swaps[n]) for name in models}
        found = take_turns(runs, turns)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in found.items()}


def llama_layer(dtype: torch.dtype) -> nn.Module:
    """One layer of LLaMA-7B's shapes."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--new", type=int, default=10)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = load(args)
    models = {name: tuned(load(args), config, ADAPTERS) for name, config in configurations(base, args.k).items()}
    print(f"{args.model}, {args.dtype}, k = {args.k}, {args.threads} thread(s), load {os.getloadavg()[0]:.1f}")

    one = torch.randint(0, 1000, (1, args.length))
    runs = {name: lambda m=model: decode_seconds(m, one, args.new) for name, model in {"base": base, **models}.items()}
    found = take_turns(runs, args.turns)
    print("decode:", ", ".join(f"{name} {1 / statistics.median(found[name]):.1f} tokens/s" for name in found))
    ratios = {name: ratio(found, name, "neuroada") for name in ("base", "lora")}
    print(f"  NeuroAda's rate / base's {ratios['base']:.2f}, / LoRA's {ratios['lora']:.2f}")

    batch = torch.randint(0, 1000, (args.rows, args.length))
    names = {"mixed": {"adapter_names": [ADAPTERS[row % 8] for row in range(args.rows)]}, "alone": {}}
    runs = {f"{name} {kind}": lambda m=model, o=options: forward_seconds(m, batch, **o)
            for name, model in models.items() for kind, options in names.items()}  # fmt: skip
    found = take_turns(runs, max(3, args.turns // 2))
    for name in models:
        print(f"mixed / alone, {name}: {ratio(found, f'{name} mixed', f'{name} alone'):.2f}")
    print(f"mixed, neuroada / lora: {ratio(found, 'neuroada mixed', 'lora mixed'):.2f}")

    print("swap:", ", ".join(f"{name} {took:.0f} ms" for name, took in swap(models, args.turns).items()))
    del models, base
    layer = llama_layer(torch.bfloat16)
    layers = {name: tuned(copy.deepcopy(layer), config, ADAPTERS[:2])
              for name, config in configurations(layer, args.k).items()}  # fmt: skip
    told = ", ".join(f"{name} {took:.1f} ms" for name, took in swap(layers, args.turns).items())
    print(f"swap, one layer of LLaMA-7B's shapes, bfloat16 (x 32): {told}")


if __name__ == "__main__":
    main()
