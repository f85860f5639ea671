"""Experts whose weights are parameters of three dimensions, which no Linear wraps: `target_parameters`.

transformers 5 fuses a layer's experts into `gate_up_proj` and `down_proj`, and runs them all by one of a few functions
that a flag on the module describes (`use_experts_implementation`). The layer here computes the same from the same
flags, with each adapted weight's product replaced. A neuron is an output of one expert: a row of [experts, out, in],
or, where `is_transposed` says so (gpt-oss), a column of [experts, in, out]; nothing is concluded from shapes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from neuroada import sharding
from neuroada.adapter import mixed
from neuroada.adapter.base_weight import KINDS, BaseWeight
from neuroada.adapter.hooks import brought, call_with_hooks, has_hooks
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.errors import UserError
from neuroada.ops import PLAIN, TRANSPOSED, experts_linear, tokens_of_experts

NAMES = ("gate_up_proj", "up_proj", "down_proj")


class ExpertsParameter(nn.Module):
    """One weight of the experts, as a module that does not own it: what `ExpertsWeight` calls its layer."""

    experts: Any

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not a submodule: the parameter belongs to the experts alone
        self.parameter = parameter

    @property
    def weight(self) -> nn.Parameter:
        return self.experts._parameters[self.parameter]


class ExpertsWeight(BaseWeight):
    """Stored [experts, out, in] or [experts, in, out], sharded along its experts; rows: the neurons of each in turn."""

    layer: ExpertsParameter

    @staticmethod
    def serves(module: nn.Module) -> bool:
        return isinstance(module, ExpertsParameter)

    def _sizes(self) -> tuple[int, int]:
        self.transposed = bool(self.layer.experts.is_transposed)
        self.format = TRANSPOSED if self.transposed else PLAIN
        self.experts, *sizes = sharding.shape(self.stored)
        out_features, in_features = reversed(sizes) if self.transposed else sizes
        self.neurons = (self.experts, out_features)
        return self.experts * out_features, in_features

    @property
    def bias(self) -> torch.Tensor | None:
        return self.layer.experts._parameters.get(f"{self.layer.parameter}_bias")

    def _rows(self, experts: slice) -> slice:
        return slice(experts.start * self.neurons[1], experts.stop * self.neurons[1])

    @contextmanager
    def own_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        with brought(self.layer.experts), sharding.own_rows(self.stored) as (experts, values):
            values = values.transpose(1, 2) if self.transposed else values
            yield self._rows(experts), values.reshape(-1, self.in_features)

    @contextmanager
    def beside(self, param: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        with sharding.own_rows(param) as (experts, values):
            yield self._rows(experts), values.flatten(0, 1)

    def join_rows(self, values: torch.Tensor) -> torch.Tensor:
        return sharding.join_rows(self.stored, self._by_expert(values)).flatten(0, 1)

    def write_rows(self, rows: slice, values: torch.Tensor) -> None:
        values = self._by_expert(values)
        super().write_rows(self._experts(rows), values.transpose(1, 2) if self.transposed else values)

    def write_beside(self, param: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
        super().write_beside(param, self._experts(rows), self._by_expert(values))

    def _experts(self, rows: slice) -> slice:
        return slice(rows.start // self.neurons[1], rows.stop // self.neurons[1])

    def _by_expert(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, self.neurons[1], values.shape[1])


KINDS.append(ExpertsWeight)


class NeuroAdaExpertsWeight(NeuroAdaLinear):
    """One adapted weight of the experts; `neuroada_idx` [experts, out, 2k] and `neuroada_delta` [experts, out, k]."""

    base: ExpertsWeight

    def __init__(self, experts: nn.Module, parameter: str, name: str) -> None:
        super().__init__(ExpertsParameter(experts, parameter), name)

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """x [tokens, in], in the order of their experts -> [tokens, out]; without the bias."""
        active = self.active_in_pass()
        if active is None:
            return experts_linear(x, counts, self.base.stored, None, None, self.base.format, self.base.neurons[1])
        with brought(self.neuroada_idx.holder(active), self.neuroada_delta.holder(active)):
            idx, delta = self.params(active)
            return experts_linear(x, counts, self.base.stored, idx, delta, self.base.format, self.base.neurons[1])

    def active_in_pass(self) -> str | None:
        """The adapter that a pass computes with now; None: the base alone, into which one may be merged."""
        if mixed.passes and mixed.current() is not None:
            raise UserError("adapter_names: not for an adapter of experts (target_parameters), whose tokens are sorted")
        if self.disable_adapters or self.merged_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.neuroada_delta]
        if len(active) > 1:
            raise UserError(f"adapters {active}: experts (target_parameters) run one at a time; activate a single one")
        self._check_selected(active)
        return active[0] if active else None

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        raise UserError("target_parameters: the dense change of experts is not made; merge the adapter instead")


class NeuroAdaExperts(nn.Module):
    """Wraps a module of experts; its adapted weights are submodules named as the parameters they adapt."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = experts

    def adapt(self, parameter: str, name: str) -> NeuroAdaExpertsWeight:
        """The layer of this parameter, made where it is not there yet."""
        if parameter not in self._modules:
            check_experts(self.base_layer, parameter, name)
            self.add_module(parameter, NeuroAdaExpertsWeight(self.base_layer, parameter, name))
        return self._modules[parameter]  # type: ignore[return-value]

    def layers(self) -> list[NeuroAdaExpertsWeight]:
        return [module for module in self.children() if isinstance(module, NeuroAdaExpertsWeight)]

    def discard(self, adapter: str) -> bool:
        """Leave nothing of this adapter; whether none is left, so that the experts can stand alone again."""
        for layer in self.layers():
            if adapter in layer.neuroada_idx:
                layer.delete_adapter(adapter)
            if not layer.neuroada_idx:
                del self._modules[layer.base.layer.parameter]
        return not self.layers()

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, in], chosen [tokens, top_k] experts, scores [tokens, top_k] -> [tokens, in]."""
        if all(layer.active_in_pass() is None for layer in self.layers()):
            return self.base_layer(hidden, chosen, scores)
        if has_hooks(self.base_layer):
            return call_with_hooks(self.base_layer, self._adapted, hidden, chosen, scores)
        return self._adapted(hidden, chosen, scores)

    def _adapted(self, hidden: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As transformers' `grouped_mm_experts_forward`: tokens sorted by expert, two products, a weighted sum."""
        experts = self.base_layer
        if experts._is_expert_parallel:
            raise UserError("target_parameters: experts that are split over ranks cannot be adapted; load them whole")
        top_k = chosen.shape[1]
        by_expert, order = torch.sort(chosen.flatten(), stable=True)
        counts = tokens_of_experts(by_expert, experts.num_experts)
        y = self._product("gate_up_proj" if experts.has_gate else "up_proj", hidden[order // top_k], counts, by_expert)
        y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
        y = self._product("down_proj", y, counts, by_expert)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        y = y * scores.flatten()[order, None]
        restored = torch.empty_like(y).index_copy(0, order, y)
        return restored.view(len(hidden), top_k, -1).sum(1).to(hidden.dtype)

    def _product(self, name: str, x: torch.Tensor, counts: list[int], by_expert: torch.Tensor) -> torch.Tensor:
        layer: Any = self._modules.get(name)
        if layer is None:
            base = ExpertsWeight(ExpertsParameter(self.base_layer, name))
            y = experts_linear(x, counts, base.stored, None, None, base.format, base.neurons[1])
            return y if base.bias is None else y + base.bias[by_expert]
        y = layer(x, counts)
        bias = layer.base.bias
        return y if bias is None else y + bias[by_expert]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The experts themselves, by PEFT's protocol."""
        for layer in self.layers():
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def check_experts(experts: nn.Module, parameter: str, name: str) -> None:
    """Refuse what is not computed as `NeuroAdaExperts` computes it."""
    problem = ""
    param = experts._parameters.get(parameter)
    flags = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "_is_expert_parallel", "num_experts")
    if parameter not in NAMES or param is None or len(sharding.shape(param)) != 3:
        problem = f"is no weight [experts, ., .] named {', '.join(NAMES[:-1])} or {NAMES[-1]}"
    elif any(not hasattr(experts, flag) for flag in flags):
        problem = f"belongs to {type(experts).__name__}, which is not run by transformers' own experts' functions"
    elif not param.is_floating_point():
        problem = f"is quantised ({param.dtype})"
    if problem:
        raise UserError(f"target_parameters: {name} {problem}; leave it out of target_parameters")
