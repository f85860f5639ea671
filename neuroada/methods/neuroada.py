"""NeuroAda: k connections of every neuron, written into the weight as it is used."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from neuroada import sharding
from neuroada.adapter import NeuroAdaConfig, NeuroAdaLinear
from neuroada.adapter.adapter_file import AGAIN, CONFIG_FILE
from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.neurons import frozen_count
from neuroada.engines import Engine
from neuroada.errors import UserError
from neuroada.files import StoredTensor, read_json
from neuroada.hf.loading import DTYPES
from neuroada.methods.base import EVERYWHERE, Calibration, Change
from neuroada.methods.connections import choose_connections
from neuroada.methods.kernel import pin_kernel
from neuroada.methods.peft_method import USAGE, PeftMethod
from neuroada.quantised import Quantisation
from neuroada.tasks.table import get_task


class NeuroAda(PeftMethod):
    name = "neuroada"
    sizes = "k"
    selects = True
    prefix = "neuroada_"
    values = ".neuroada_delta"
    follows = frozenset({"exclude_modules", "layers", "neuron_fraction", "delta_dtype"})
    strategies = EVERYWHERE
    adapts_experts = True
    usage = f"import neuroada  # PEFT knows the method from here on\n{USAGE}"

    def describe(self) -> str:
        told = f"NeuroAda, k = {self.adapter.k}"
        if self.adapter.neuron_fraction < 1:
            told += f" of {self.adapter.neuron_fraction:.4g} of the neurons ({self.adapter.neuron_choice})"
        if self.adapter.delta_dtype != "fp32":
            told += f", {self.adapter.delta_dtype} deltas"
        return told if self.adapter.selection == "magnitude" else f"{told}, {self.adapter.selection} selection"

    def config(self, task_type: str) -> NeuroAdaConfig:
        # "gradient" leaves the choice for later; a selection file then says how its own was made.
        selection = "gradient" if self.adapter.selection_file else self.adapter.selection
        return NeuroAdaConfig(
            k=self.adapter.k,
            selection=selection,
            lift_rank=self.adapter.lift_rank,
            target_parameters=self.adapter.target_parameters,
            neuron_fraction=self.adapter.neuron_fraction,
            neuron_choice=self.adapter.neuron_choice,
            seed=self.seed,
            task_type=task_type,
            **self.places,
        )

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        tuned = super().attach(model, task_type)
        for layer in _layers(tuned):
            layer.neuroada_delta.to(DTYPES[self.adapter.delta_dtype])  # AdamW makes its moments in the same dtype
        return tuned

    def refusal(self, strategy: str) -> str | None:
        if self.adapter.delta_dtype == "fp32":
            return super().refusal(strategy)
        field = f"adapter.delta_dtype = {self.adapter.delta_dtype}"
        if strategy.startswith("zero"):
            return (
                f"{field}: does not run under {strategy}: DeepSpeed trains an fp32 copy of the deltas, with fp32 "
                f"moments; use engine.name=fsdp2, one process, or adapter.delta_dtype=fp32"
            )
        if strategy == "fsdp2" and self.recipe.task is not None and get_task(self.recipe.task).num_labels:
            return (
                f"{field}: does not run under fsdp2 with task {self.recipe.task}: its classifier trains in fp32, and "
                f"FSDP2 wants one dtype; use one process, or adapter.delta_dtype=fp32"
            )
        return super().refusal(strategy)

    def prepare(self, model: nn.Module, device: torch.device, compute: torch.dtype) -> None:
        train = self.recipe.train
        tokens = train.micro_batch_size * train.max_length
        pin_kernel(self.adapter.kernel, _layers(model), tokens, compute, device)

    def check_quantised(self, quantisation: Quantisation) -> None:
        if self.recipe.base.exact is None and quantisation.exact < self.adapter.k and not self.adapter.selects_later:
            # A folder quantised for fewer connections: not what the recipe means by leaving base.exact out.
            raise UserError(
                f"adapter.k = {self.adapter.k}: model = {self.recipe.model} keeps {quantisation.exact} exact entries a "
                f"row; quantise it with --exact {self.adapter.k}, or set base.exact = {quantisation.exact} to train on "
                f"it as it is"
            )

    def initialise(self, model: nn.Module) -> None:
        tuner = cast(Any, model)
        for layer in _layers(model):
            sharding.stored(layer.neuroada_delta["default"]).zero_()
            if self.adapter.selects_later:
                layer.freeze_neurons("default", tuner.peft_config["default"])
            else:
                layer.select("default", tuner.peft_config["default"])

    def choose(self, engine: Engine, model: nn.Module, calibration: Calibration) -> None:
        if self.adapter.selects_later:
            choose_connections(engine, cast(Any, model).base_model, self.recipe, calibration)

    def kind(self, name: str) -> str:
        return "idx" if ".neuroada_idx." in name else super().kind(name)

    def trainable(self, model: nn.Module) -> int:
        """Without the deltas of frozen neurons, which are stored and stay 0."""
        frozen = sum(
            sharding.shape(layer.neuroada_delta["default"])[-1]
            * frozen_count(layer.out_features, self.adapter.neuron_fraction)
            for layer in _layers(model)
        )
        return super().trainable(model) - frozen

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        config = saved / CONFIG_FILE
        content = read_json(config, remedy=AGAIN) if config.is_file() else {}
        fraction = content.get("neuron_fraction", 1.0) if isinstance(content, dict) else 1.0
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise UserError(f"{config}: neuron_fraction is {fraction!r}, not a number up to 1; {AGAIN}")
        for change in super().changes(saved, base):
            yield change._replace(entries=math.ceil(change.entries * fraction))

    def base_fingerprint(self, model: nn.Module) -> str | None:
        return fingerprint(_layers(model), "default")


def _layers(model: nn.Module) -> list[NeuroAdaLinear]:
    return [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
