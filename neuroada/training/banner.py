"""What a run says of itself before its first step, in a block that a human can read."""

import math
import shutil
from datetime import timedelta

import torch
from torch import nn

from neuroada import sharding
from neuroada.config.recipe import Recipe
from neuroada.engines import Engine, base_parameters
from neuroada.engines.collectives import gather
from neuroada.errors import node_name
from neuroada.hf.attention import describe_attention
from neuroada.hf.attention_sinks import has_sinks
from neuroada.methods import Method
from neuroada.runs.formatting import format_bytes
from neuroada.runs.metadata import code_version, library_version
from neuroada.training.checkpoint import checkpoint_bytes


def describe(
    recipe: Recipe, engine: Engine, method: Method, model: nn.Module, data: object, steps: int, first: int
) -> None:
    """Print the block, on rank 0. Collective."""
    mine = sum(sharding.stored(param).nbytes for param in model.parameters())
    found = gather(engine, (node_name(), mine))
    if engine.rank != 0:
        return
    nodes = list(dict.fromkeys(node for node, _ in found))
    trainable, total = method.trainable(model), base_parameters(model)
    train = recipe.train
    sinks = has_sinks(getattr(model, "config", None))
    attention = describe_attention(train.packed, train.dtype, engine.device, sinks)
    lines = {
        "world": f"{engine.world_size} rank(s), {engine.device.type}, on {len(nodes)} node(s): "
        f"{', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''}",
        "strategy": engine.describe(),
        "model": f"{recipe.model}, {train.dtype}, {method.describe()}",
        "attention": attention,
        "trainable": f"{trainable:,} of {total:,} ({100 * trainable / total:.4f} %)",
        "memory": f"{format_bytes(max(size for _, size in found))} of parameters on the fullest rank; gradients, "
        f"AdamW's moments and activations come on top",
        "data": f"{recipe.trained_on}: {data}",
        "steps": f"{first} of {steps} done; {train.global_batch_size} sequences each, "
        f"{recipe.micro_batch(engine.world_size)} at once on a rank",
        "checkpoints": f"every {recipe.checkpoint.every_steps} steps, {format_bytes(checkpoint_bytes(model))} each, "
        f"{format_bytes(shutil.disk_usage(recipe.output_dir).free)} free",
        "code": f"neuroada {code_version()}, torch {library_version('torch')}",
    }
    if train.dtype == "bf16" and engine.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        lines["slow"] = "torch has only AVX2 on this CPU, where bf16 is several times slower than train.dtype=fp32"
    print("\n".join(f"{name:11} {text}" for name, text in lines.items()), flush=True)


def describe_time(seconds: float, left: int, what: str) -> None:
    """Print that the `left` of `what` ("steps") that are left take about `seconds`."""
    duration = timedelta(seconds=math.ceil(seconds))
    print(f"{'time':11} about {duration} (hours:minutes:seconds) for the {left} {what} left", flush=True)
