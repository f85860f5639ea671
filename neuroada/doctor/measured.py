"""What a training step takes: memory and time of NeuroAda beside other methods' and beside the plan's.

The methods live in this process side by side, at the budget of NeuroAda at k = 20, and take turns, one step each, so
that a disturbance hits all alike. Two decoder layers of a shape stand for all of them: they are alike.
"""

import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from neuroada.adapter.default_targets import DECODER
from neuroada.config.recipe import Recipe
from neuroada.doctor.check import Check, Found, NotHere, Place
from neuroada.engines import adamw
from neuroada.hf.attention import choose_attention
from neuroada.hf.config import find_config
from neuroada.hf.loading import DTYPES
from neuroada.methods import Method, make_method
from neuroada.objectives import make_objective
from neuroada.planning.frozen import Frozen
from neuroada.planning.step import record_step
from neuroada.planning.strategies import memory
from neuroada.planning.timeline import Recorder
from neuroada.planning.traffic import step_flops
from neuroada.runs.formatting import format_bytes

LAYERS, K = 2, 20
OTHERS = ("lora", "shira", "masked")
REPETITIONS = 7

PEAK_FLOPS = {
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H200 NVL": 836e12,
    r"\b(H100|H200|GH200)\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bA10\b": 125e12,
    r"\bL4\b": 121e12,
}
"""A device's name -> its bf16 matrix products a second, dense, by NVIDIA's data sheets. The first that fits."""


@dataclass(frozen=True)
class Shape:
    """LAYERS decoder layers of a model, under its own embedding and head, and a batch.

    config: makes its configuration. time_limit: of NeuroAda's step over LoRA's. memory_limit: of its peak over the
    smallest of the other methods'.
    """

    name: str
    device: str
    config: Callable[[], Any]
    dtype: str
    rows: int
    tokens: int
    time_limit: float
    memory_limit: float

    def recipe(self, rank: int = 1) -> Recipe:
        return Recipe.model_validate(
            {
                "model": self.name,
                "task": "arithmetic",
                "adapter": {"k": K, "rank": rank, "target_modules": DECODER, "trainable_dtype": self.dtype},
                "optimizer": {"lr": 1e-4},
                "train": {"global_batch_size": self.rows, "micro_batch_size": self.rows, "max_length": self.tokens,
                          "dtype": self.dtype, "packing": True},
                "output_dir": "unused",
                "provenance": "made for a check",
            }
        )  # fmt: skip


def _small() -> Any:
    return LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=512
    )


def _layers_of(source: str) -> Any:
    config, _ = find_config(source)
    config.num_hidden_layers = LAYERS
    return config


_card = functools.partial(Shape, device="cuda", dtype="bf16", rows=4, tokens=512, time_limit=1.1, memory_limit=1.0)

SHAPES = (
    # So small that the time is that of starting operators, and in fp32, where LoRA needs no casts of its inputs: its
    # limits only tell that nothing is badly wrong.
    Shape("small", "cpu", _small, "fp32", rows=2, tokens=128, time_limit=2.0, memory_limit=1.05),
    _card("1b", config=functools.partial(_layers_of, "meta-llama/Llama-3.2-1B")),
    _card("7b", config=functools.partial(_layers_of, "yahma/llama-7b-hf")),
)


class Contender:
    """A model of a shape with a method attached, and its optimizer."""

    def __init__(self, shape: Shape, recipe: Recipe, method: Method, device: torch.device) -> None:
        self.device, self.objective = device, make_objective(recipe)
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        compute = DTYPES[shape.dtype]
        torch.manual_seed(0)
        with device:
            base: Any = AutoModelForCausalLM.from_config(
                shape.config(),
                dtype=method.storage_dtype(compute),
                attn_implementation=choose_attention(recipe.train.packed, shape.dtype, device),
            )
        self.model: Any = method.attach(base, self.objective.task_type).to(device).train()
        method.prepare(self.model, device, compute)
        self.optimizer = adamw(self.model, recipe)
        self.batch = self.objective.longest_batch(base.config.vocab_size).to(device)

    def step(self) -> float:
        """Take a step; the seconds it took."""
        self._wait()
        started = time.perf_counter()
        self.objective.summed_loss(self.model, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        """Bytes alive at the peak of a step, not the first: the allocator's count on CUDA, else of each storage."""
        self.step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device) - self.before
        recorder = Recorder()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held = (*self.model.parameters(), *self.model.buffers(), *states, *self.batch.inputs.values())
        for tensor in (*held, self.batch.targets):
            recorder.add(tensor)
        with recorder:
            self.step()
        live = most = 0
        for delta, _, _ in recorder.events:
            live += delta
            most = max(most, live)
        return most


@dataclass(frozen=True)
class Measured:
    """Of one shape, by method: bytes at the peak, and seconds of each repetition.

    planned: bytes of NeuroAda, by the plan. flops: of NeuroAda's step. left_out: other methods that did not run, and
    how they failed.
    """

    peaks: dict[str, int]
    seconds: dict[str, list[float]]
    planned: int
    flops: int
    left_out: list[str]

    def others(self) -> list[str]:
        """Those that ran. RuntimeError where LoRA did not."""
        if "lora" not in self.peaks:
            raise RuntimeError("; ".join(self.left_out))
        return [name for name in OTHERS if name in self.peaks]

    def median(self, method: str) -> float:
        return statistics.median(self.seconds[method])

    def ratio(self, method: str, other: str) -> float:
        """Median of the ratios within a repetition."""
        pairs = zip(self.seconds[method], self.seconds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@functools.cache
def measure(shape: Shape, device: torch.device) -> Measured:
    """Measured once for all checks of a shape. NotHere: the shape is for another kind of device."""
    if device.type != shape.device:
        raise NotHere("needs a GPU" if shape.device == "cuda" else "a small shape, for machines without a GPU")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise NotHere(f"{torch.cuda.get_device_name(device)} has no bf16")
    recipe = shape.recipe()
    step = record_step(recipe, shape.config(), accumulating=False)
    recipe = shape.recipe(rank=rank_of(step.trainable, recipe, shape))
    methods = [Frozen(recipe), *(make_method(recipe, name) for name in ("neuroada", *OTHERS))]
    contenders, peaks, left_out = {}, {}, {}
    for method in methods:
        try:
            contenders[method.name] = Contender(shape, recipe, method, device)
            peaks[method.name] = contenders[method.name].peak()
        except Exception as error:  # of PEFT on a device that nobody has seen: NeuroAda is measured all the same
            if method.name not in OTHERS:
                raise
            contenders.pop(method.name, None)
            left_out[method.name] = f"{method.name} failed: {type(error).__name__}"
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPETITIONS):
        for name, contender in contenders.items():
            seconds[name].append(contender.step())
    planned = memory(step, "single", 1).peak_bytes
    return Measured(peaks, seconds, planned, step_flops(recipe, shape.config(), step), list(left_out.values()))


def rank_of(budget: int, recipe: Recipe, shape: Shape) -> int:
    """The rank at which LoRA trains as many parameters, at least 1."""

    def count(fields: dict[str, Any]) -> int:
        sized = shape.recipe(**fields)
        return record_step(sized, shape.config(), False, make_method(sized, "lora")).trainable

    return make_method(recipe, "lora").match(budget, count)["rank"]


class PlannedMemory(Check):
    number = "planned over measured peak, less 1, without its sign"

    def __init__(self, shape: Shape) -> None:
        self.shape, self.name = shape, f"memory-plan-{shape.name}"
        self.claim = f"a step of NeuroAda holds what the plan says, at the {shape.name} shape"

    def run(self, place: Place) -> Found:
        found = measure(self.shape, place.device)
        measured = found.peaks["neuroada"]
        told = f"planned {format_bytes(found.planned)}, measured {format_bytes(measured)}"
        numbers = {"planned bytes": float(found.planned), "measured bytes": float(measured)}
        return Found(abs(found.planned / measured - 1), 0.1, told, numbers)


class LessMemory(Check):
    number = "NeuroAda's peak over the smallest of the others'"

    def __init__(self, shape: Shape) -> None:
        self.shape, self.name = shape, f"memory-beside-{shape.name}"
        self.claim = (
            f"a step of NeuroAda holds at most {shape.memory_limit:g} times what LoRA's, SHiRA's and masked tuning's "
            f"hold, at the {shape.name} shape"
        )

    def run(self, place: Place) -> Found:
        found = measure(self.shape, place.device)
        value = found.peaks["neuroada"] / min(found.peaks[name] for name in found.others())
        told = ", ".join([*(f"{name} {format_bytes(peak)}" for name, peak in found.peaks.items()), *found.left_out])
        numbers = {f"{name}, bytes": float(peak) for name, peak in found.peaks.items()}
        return Found(value, self.shape.memory_limit, told, numbers)


class StepTime(Check):
    number = "NeuroAda's step over LoRA's with as many trainable parameters, median"

    def __init__(self, shape: Shape) -> None:
        self.shape, self.name = shape, f"step-time-{shape.name}"
        self.claim = f"a step of NeuroAda takes at most {shape.time_limit:g} times LoRA's, at the {shape.name} shape"

    def run(self, place: Place) -> Found:
        found = measure(self.shape, place.device)
        found.others()
        numbers = {f"{name}, seconds": found.median(name) for name in found.seconds}
        numbers["tokens per second"] = self.shape.rows * self.shape.tokens / found.median("neuroada")
        told = ", ".join(f"{name} {1e3 * found.median(name):.1f} ms" for name in found.seconds)
        told += f"; {numbers['tokens per second']:,.0f} tokens/s"
        most = peak_flops(place.device)
        if most is None:
            told += "; no utilisation: the device's peak FLOPs are not known here"
        else:
            numbers["model FLOPs utilisation"] = found.flops / found.median("neuroada") / most
            told += f"; {100 * numbers['model FLOPs utilisation']:.0f} % of the device's bf16 FLOPs"
        return Found(found.ratio("neuroada", "lora"), self.shape.time_limit, told, numbers)


def peak_flops(device: torch.device) -> float | None:
    """Of the device in bf16, where its name is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for pattern, flops in PEAK_FLOPS.items() if re.search(pattern, name)), None)
