"""The methods a recipe can train, NeuroAda among them: by the same loop, data, scoring and report.

    neuroada      k connections of each neuron, written into the weight as it is used
    lora          PEFT's LoRA of adapter.rank, alpha = 2 x rank
    shira         PEFT's SHiRA: adapter.rank x (in + out) random entries of a weight, LoRA's budget at that rank
    supertuning   PEFT's Super-Tuning: the (1 - adapter.sparsity) largest entries of a weight, whatever their row
    masked        neuroada's connections, tuned the mask-based way: whole weights train, a mask clears the gradient
    full          every weight of the model, embeddings too
    head          an encoder's classifier alone

masked and full train the weights themselves: in fp32, computing in train.dtype by autocast, and saved as an ordinary
checkpoint in <output_dir>/model instead of an adapter.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neuroada import sharding
from neuroada.adapter.saved import save_adapter
from neuroada.adapter.selection import select_top_k
from neuroada.errors import UserError
from neuroada.training.classifier import NAMES as CLASSIFIERS
from neuroada.training.recipe import Adapter, Recipe

WHOLE_WEIGHTS = ("masked", "full")

_WHOLE = ("single", "zero1", "zero2")
STRATEGIES = {
    "neuroada": (*_WHOLE, "zero3", "fsdp2"),
    "lora": (*_WHOLE, "zero3"),
    "shira": _WHOLE,
    "supertuning": _WHOLE,
    "masked": _WHOLE,
    "full": (*_WHOLE, "zero3"),
    "head": (*_WHOLE, "zero3", "fsdp2"),
}
"""Where each method runs."""

_REASONS = {
    ("lora", "fsdp2"): "its matrices would be left unset: weights come to life after the adapter is attached",
    ("full", "fsdp2"): "this engine loads frozen weights and adapters only",
    ("shira", "zero3"): "PEFT's SHiRA reads the base weight without gathering its partitions",
    ("supertuning", "zero3"): "PEFT's Super-Tuning reads the base weight without gathering its partitions",
    ("masked", "zero3"): "the mask would have to be partitioned as the gradient is",
}


def strategy(engine: Any) -> str:
    """single, zero1, zero2, zero3 or fsdp2."""
    name = type(engine).__name__.removesuffix("Engine").lower()
    return f"zero{engine.config.get('zero_optimization', {}).get('stage', 0)}" if name == "deepspeed" else name


def check_method(recipe: Recipe, engine: Any) -> None:
    """Refuse, before a weight is loaded, what a method cannot do.

    Raises:
        UserError: the engine's strategy, or a field of the recipe, and the reason.
    """
    method, kept = recipe.adapter.method, strategy(engine)
    if kept not in STRATEGIES[method] and kept != "zero0":
        reason = _REASONS.get((method, kept), "it chooses its entries from weights that are not there yet")
        raise UserError(f"adapter.method = {method}: does not run under {kept}: {reason}; use "
                        f"{' or '.join(STRATEGIES[method])}")  # fmt: skip
    if method == "masked" and recipe.optimizer.weight_decay:
        raise UserError(
            f"optimizer.weight_decay = {recipe.optimizer.weight_decay}: with adapter.method = masked it would also "
            f"shrink the weights under the mask; set it to 0"
        )
    if method == "masked" and recipe.adapter.selection == "gradient":
        raise UserError("adapter.selection = gradient: method masked has magnitude, reverse and random")


def sparse_config(adapter: Adapter, seed: int, task_type: str | None) -> Any:
    """PEFT's configuration of shira or supertuning."""
    from peft import ShiraConfig, SupertuningConfig

    shared: dict[str, Any] = {"target_modules": list(adapter.target_modules), "task_type": task_type}
    if adapter.method == "shira":
        return ShiraConfig(r=adapter.rank, random_seed=seed, **shared)
    return SupertuningConfig(sparsity=adapter.sparsity, **shared)


def train_weights(model: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """Make the model's own weights train: all (full), or those of the target modules under a mask (masked)."""
    model.requires_grad_(adapter.method == "full")
    if adapter.method == "full":
        return model
    inside = [(name, module) for name, module in model.named_modules() if name.split(".")[0] not in CLASSIFIERS]
    for name in CLASSIFIERS:
        getattr(model, name, nn.Identity()).requires_grad_(True)  # trained whole, as beside an adapter
    for target in adapter.target_modules:
        layers = [module for name, module in inside if f".{name}".endswith(f".{target}")]
        if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
            raise UserError(f"adapter.target_modules: {target!r} is no Linear module of the model")
        for weight in (layer.get_parameter("weight") for layer in layers):
            if adapter.k > weight.shape[1]:
                raise UserError(f"adapter.k = {adapter.k}: a neuron of {target} has only {weight.shape[1]} inputs")
            chosen = select_top_k(weight.data, adapter.k, adapter.selection, seed=seed)
            mask = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, chosen, True)
            weight.requires_grad_(True)
            weight.register_hook(lambda grad, mask=mask: grad * mask)
            weight.trained_entries = adapter.k * len(weight)
    return model


def load_model(engine: Any, recipe: Recipe, dtype: torch.dtype) -> nn.Module:
    """The engine's model with what the recipe trains, computing in `dtype`."""
    if recipe.adapter.method not in WHOLE_WEIGHTS:
        return engine.load(dtype)
    model = engine.load(torch.float32)  # small steps vanish in bf16 weights
    if dtype != torch.float32:
        model.forward = torch.autocast(engine.device.type, dtype)(model.forward)
    return model


def trainable(model: nn.Module) -> int:
    """Numbers that training can change: under a mask fewer than the optimizer holds."""
    params = [param for param in model.parameters() if param.requires_grad]
    return sum(getattr(param, "trained_entries", sharding.shape(param).numel()) for param in params)


def trained_folder(recipe: Recipe) -> Path:
    """Where a run's result goes."""
    return Path(recipe.output_dir) / ("model" if recipe.adapter.method in WHOLE_WEIGHTS else "adapter")


def save_trained(model: nn.Module, recipe: Recipe, tokenizer: Any) -> None:
    """Write what was trained, with the tokenizer: PEFT's format, or a Hugging Face checkpoint in train.dtype.

    Collective; rank 0 writes.
    """
    method, first = recipe.adapter.method, not dist.is_initialized() or dist.get_rank() == 0
    folder = trained_folder(recipe)
    if method not in WHOLE_WEIGHTS:
        model.peft_config["default"].base_model_name_or_path = recipe.model  # type: ignore[union-attr, index]
    if method in WHOLE_WEIGHTS:
        _save_weights(model, folder, torch.bfloat16 if recipe.train.dtype == "bf16" else torch.float32, first)
    elif method in ("shira", "supertuning"):  # whole on every rank; their indices are no parameters
        if first:
            with _renamed(folder) as partial:
                model.save_pretrained(partial, save_embedding_layers=False)  # type: ignore[operator]
    else:
        save_adapter(model, folder)  # type: ignore[arg-type]
    if first:
        tokenizer.save_pretrained(folder)


def _save_weights(model: nn.Module, folder: Path, dtype: torch.dtype, first: bool) -> None:
    """A Hugging Face checkpoint, one parameter gathered at a time."""
    state: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        with sharding.whole(param) as value:
            if first:
                state[name] = value.detach().to("cpu", dtype, copy=True)
    if first:
        model.config.dtype = dtype
        with _renamed(folder) as partial:
            model.save_pretrained(partial, state_dict=state)  # type: ignore[operator]


@contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name, which takes its own when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
