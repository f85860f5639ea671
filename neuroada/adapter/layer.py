"""The in-weight layer: a Linear, and for each adapter its indices and deltas, sharded as the weight is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from neuroada import sharding
from neuroada.adapter import mixed
from neuroada.adapter.base_weight import base_weight
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.hooks import brought, call_with_hooks, has_hooks
from neuroada.adapter.neurons import frozen_neurons
from neuroada.adapter.parameters import AdapterParameters
from neuroada.adapter.selection import FROM_WEIGHTS, NEEDS, lift_scores, select_top_k
from neuroada.errors import UserError
from neuroada.ops import (
    MAX_IN_FEATURES,
    adapted,
    in_weight_linear,
    pack_indices,
    read_entries,
    sum_repeated,
    unpack_indices,
    write_entries,
)

UNSELECTED = 0xFF
"""Every byte of indices that are still to be chosen: column 65,535, in a row more than once or beyond its end."""


class NeuroAdaLinear(nn.Module, BaseTunerLayer):
    """Wraps a Linear, whose weight keeps the base values but while merged: a pass never writes into it.

    For each adapter, parameters of [out_features, .]: `neuroada_idx` (2k uint8: k uint16 column numbers) and
    `neuroada_delta` (k, fp32 or as the trainer casts it, the only one that trains). Where several adapters are active,
    their changes add up.
    """

    adapter_layer_names = ("neuroada_delta",)  # set_adapter turns gradients on for these: floating point only
    other_param_names = ("neuroada_idx",)

    def __init__(self, base_layer: nn.Module, name: str, tied: bool = False) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.name = name
        self.base = base_weight(base_layer, name)
        self.in_features, self.out_features = self.base.in_features, self.base.out_features
        self.quantisation = self.base.quantisation  # of the weights the adapter belongs to, which a merge makes dense
        self.neuroada_idx = AdapterParameters()
        self.neuroada_delta = AdapterParameters()
        self.frozen: dict[str, torch.Tensor | None] = {}  # by adapter: `frozen_neurons`; None: not known yet
        self.unselected: set[str] = set()  # adapters whose connections are not known to be chosen or loaded
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._replaced = torch.empty(0)  # the base values that `merge` wrote over, of this rank's rows
        self.tied = tied  # whether another module uses the weight too
        self.trained_on: dict[str, str] = {}  # adapter -> the checksum of the base under all its connections
        self._whole_idx: dict[str, torch.Tensor] = {}  # of sharded indices, on rank 0's host: see `own_copy`

    def add_adapter(self, adapter: str, config: NeuroAdaConfig) -> None:
        """Make the adapter's parameters and, where they can be now, choose its connections.

        Connections come later on the meta device (`select`, once the weights are there), for selection = gradient
        (`select_by_gradient`) and wanda (`select_by_activations`), and for an adapter that is being loaded (its file
        holds them).
        """
        k = config.k_of(self.name)
        if k > self.in_features:
            raise UserError(
                f"k = {k}: {self.name} has only {self.in_features} inputs; choose k <= {self.in_features}, give it a "
                f"smaller one with k_pattern, or leave it out with exclude_modules"
            )
        if self.in_features > MAX_IN_FEATURES:
            raise UserError(
                f"target_modules: {self.name} has {self.in_features} inputs; indices of two bytes reach "
                f"{MAX_IN_FEATURES}: leave it out with exclude_modules"
            )
        with brought(self.base_layer):  # an offloaded weight's device is that of its passes
            weight = self.base.stored
            # under PEFT's low_cpu_mem_usage, new tensors are on the meta device whatever is asked for
            idx = torch.full((*self.base.neurons, 2 * k), UNSELECTED, dtype=torch.uint8, device=weight.device)
            delta = torch.zeros(*self.base.neurons, k, dtype=torch.float32, device=weight.device)
            if not config.init_weights:
                delta.normal_()
            self.neuroada_idx[adapter] = nn.Parameter(idx, requires_grad=False)
            self.neuroada_delta[adapter] = nn.Parameter(delta)
            sharding.adopt(self, weight, self.params(adapter))
        self.unselected.add(adapter)
        loading = config.base_fingerprint is not None or self.params(adapter)[0].is_meta
        if not loading and config.selection in FROM_WEIGHTS:
            self.select(adapter, config)
        else:
            self.freeze_neurons(adapter, config)

    def select(self, adapter: str, config: NeuroAdaConfig) -> None:
        """Choose the adapter's connections from the weight. Collective where the weight is sharded."""
        self.freeze_neurons(adapter, config)
        k = config.k_of(self.name)
        ranked = config.selection == "magnitude" and not self.merged_adapters
        with self.base.ranked_rows(k) if ranked else self._base_rows() as (rows, weight):
            scores = weight
            if NEEDS[config.selection] == "matrix":
                scores = self._lift_scores(weight, config.lift_rank)[rows]
            idx = select_top_k(scores, k, config.selection, first_row=rows.start, seed=config.seed)
            self.set_connections(adapter, rows, idx, weight)

    def _lift_scores(self, own: torch.Tensor, rank: int) -> torch.Tensor:
        """Scores of the whole weight, which every rank gathers from its `own` rows and decomposes by itself."""
        if len(self.base.neurons) > 1:
            raise UserError(f"selection = lift: not for experts, such as {self.name}; use magnitude, reverse or random")
        return lift_scores(self.base.join_rows(own), rank, self.name)

    def freeze_neurons(self, adapter: str, config: NeuroAdaConfig) -> None:
        """Note which neurons the adapter does not train; later, if that takes a weight that is on the meta device.
        Collective where the weight is sharded."""
        if config.neuron_fraction < 1:
            known = config.neuron_choice == "random" or not self.base.stored.is_meta
            self.frozen[adapter] = frozen_neurons(self, config) if known else None

    def base_norms(self) -> torch.Tensor:
        """The L2 norm of every row of the base weight, [out] fp32, on every rank. Collective if sharded."""
        with self._base_rows() as (_, weight):
            # Summed in float64: the same after rounding, however many rows a rank works on.
            norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64)
        return self.base.join_rows(norms.float()).flatten()

    def set_connections(self, adapter: str, rows: slice, idx: torch.Tensor, weight: torch.Tensor) -> None:
        """Store `rows` of the indices, [rows, k] int64; `weight` holds those rows of the base, [rows, in]."""
        if not torch.isfinite(read_entries(weight, idx)).all():
            raise UserError(f"{self.name}.weight holds values that are not finite: the base checkpoint is damaged")
        self.base.write_beside(self.params(adapter)[0], rows, pack_indices(idx))
        self.unselected.discard(adapter)

    def is_selected(self, adapter: str) -> bool:
        """Whether the adapter's connections were chosen or loaded, by whatever way. Collective if sharded, at most
        once for an adapter."""
        if adapter in self.unselected and not self.params(adapter)[0].is_meta:
            with sharding.own_rows(self.params(adapter)[0]) as (_, idx):
                chosen = not len(idx) or bool((idx != UNSELECTED).any())
            if chosen:
                self.unselected.discard(adapter)
        return adapter not in self.unselected

    def base_values(self, adapter: str) -> torch.Tensor:
        """The base's values at the adapter's connections, [out_features, k], on every rank. Collective if sharded."""
        return self.base_values_at(self.params(adapter)[0])

    def base_values_at(self, idx_bytes: torch.Tensor) -> torch.Tensor:
        """As `base_values`, at connections that no adapter has yet: `idx_bytes` as in an adapter's file, whole, or a
        parameter."""
        with self._base_rows() as (_, weight), self.base.beside(idx_bytes) as (_, idx):
            return self.base.join_rows(read_entries(weight, unpack_indices(idx)))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Decoding comes here for every layer of every token, where torch's look-up by attribute counts.
        modules: Any = self._modules
        base_layer, deltas = modules["base_layer"], modules["neuroada_delta"]._modules
        mixture = mixed.current() if mixed.passes else None
        if self._disable_adapters or (mixture is None and self.merged_adapters):
            return base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in deltas] if mixture is None else mixture.of(deltas)
        if not active:
            return base_layer(x, *args, **kwargs)
        if self.unselected:
            self._check_selected(active)
        if has_hooks(base_layer) or any("_hf_hook" in deltas[name].__dict__ for name in active):
            holders = [part.holder(name) for name in active for part in (self.neuroada_idx, self.neuroada_delta)]
            with brought(*holders):
                return call_with_hooks(base_layer, lambda x: self._adapted(x, active, mixture), x)
        return self._adapted(x, active, mixture)

    def _check_selected(self, adapters: list[str]) -> None:
        # In a pass an engine has gathered the indices: each rank looks at its own, and finds the same.
        for adapter in adapters:
            if adapter in self.unselected:
                idx = self.params(adapter)[0]
                if idx.is_meta or not (idx != UNSELECTED).any():
                    raise UserError(
                        f"adapter {adapter!r} has no connections in {self.name} yet: load its file, call "
                        f"select_by_gradient (selection = gradient) or select_by_activations (wanda), or start a new "
                        f"one with base_fingerprint = None"
                    )
                self.unselected.discard(adapter)

    def _adapted(self, x: torch.Tensor, adapters: list[str], mixture: "mixed.Mixture | None") -> torch.Tensor:
        y = self._product(x, adapters, mixture)
        bias = self.base.added_bias
        return y if bias is None else y + bias

    def _product(self, x: torch.Tensor, adapters: list[str], mixture: "mixed.Mixture | None") -> torch.Tensor:
        if mixture is not None:
            connections = {name: (self.neuroada_idx[name], self.neuroada_delta[name]) for name in adapters}
            return mixed.product(x, mixture, self.base, connections)
        if len(adapters) == 1:
            idx, delta = self.neuroada_idx[adapters[0]], self._trained(adapters[0])
            return in_weight_linear(x, self.base.stored, self.base.bias, idx, delta, self.base.format)
        indices = torch.cat([self.neuroada_idx[name] for name in adapters], 1)
        deltas = torch.cat([self._trained(name) for name in adapters], 1)
        return in_weight_linear(x, self.base.stored, self.base.bias, indices, deltas, self.base.format, repeated=True)

    def _trained(self, adapter: str) -> torch.Tensor:
        """The adapter's deltas as a pass uses them: those of frozen neurons get a gradient of 0."""
        delta = self.neuroada_delta[adapter]
        if adapter not in self.frozen or not (torch.is_grad_enabled() and delta.requires_grad):
            return delta
        frozen = self.frozen[adapter]
        if frozen is None:
            raise UserError(
                f"neuron_choice = norm: {self.name} was on the meta device when adapter {adapter!r} was attached; call "
                f"freeze_neurons of each layer once its weight is loaded, or use neuron_choice = random"
            )
        if frozen.device != delta.device:
            frozen = self.frozen[adapter] = frozen.to(delta.device)
        return torch.where(frozen[:, None], delta.detach(), delta)

    def is_known(self, adapter: str) -> bool:
        """Whether the base's values under the adapter's connections can be read: chosen, and not on the meta device."""
        offloaded = has_hooks(self.base_layer)
        return adapter not in self.unselected and (offloaded or not self.base.stored.is_meta)

    def keep_copy(self, adapter: str) -> None:
        """On rank 0, keep sharded indices whole on the host, 2 bytes a connection, for `own_copy`. Collective."""
        idx = self.neuroada_idx[adapter]
        if not sharding.is_whole(idx):
            with sharding.whole(idx) as values:
                if dist.get_rank() == 0:
                    self._whole_idx[adapter] = values.detach().to("cpu", copy=True)

    def own_copy(self, adapter: str) -> torch.Tensor:
        """The adapter's indices, whole, without communication: [out, 2k] uint8.

        RuntimeError where they are sharded and `keep_copy` was not called on this rank.
        """
        idx = self.neuroada_idx[adapter]
        if sharding.is_whole(idx):
            return idx.detach()
        if adapter not in self._whole_idx:
            raise RuntimeError(f"{self.name}: this rank holds a part of the indices only; save on every rank")
        return self._whole_idx[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' values into the weight to stay, until `unmerge`; the same bits that forward uses."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.neuroada_delta]
        if not names:
            return
        for name in names:
            if not self.is_selected(name):
                raise UserError(f"adapter {name!r} has no connections in {self.name} yet: nothing can be merged")
        if self.tied and not sharding.is_whole(self.base.stored):
            raise UserError(f"{self.name} shares its sharded weight with another module; merge in one process")
        self._dequantise()
        adapters = self.merged_adapters + names
        idx, delta = self._own_connections(adapters)
        with self._base_rows() as (rows, weight):
            merged = weight.clone()
        replaced = read_entries(merged, idx)
        values = adapted(replaced, sum_repeated(idx, delta) if len(adapters) > 1 else delta)
        if safe_merge and not torch.isfinite(values).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        write_entries(merged, idx, values)
        before = self.merged_adapters
        if self.tied and not before:  # the other module keeps the base's values
            self._shared = self.base_layer.weight
            self.base_layer.weight = nn.Parameter(self._shared.detach().clone(), requires_grad=False)
        # First the note, then the weight: an interruption between leaves what `unmerge` puts right.
        self.merged_adapters, self._replaced = adapters, replaced
        try:
            self.base.write_rows(rows, merged)
        except BaseException:
            self.unmerge()
            if before:
                self.merge(adapter_names=before)
            raise

    def _dequantise(self) -> None:
        """Before a merge: a quantised base becomes a dense one of the very values the adapter was trained on."""
        if self.base.writable:
            return
        if not sharding.is_whole(self.base.stored):
            raise UserError(f"{self.name}: a quantised weight that is sharded is not merged; use `neuroada merge`")
        with brought(self.base_layer):
            self.base_layer = self.base.dequantised()
        self.base = base_weight(self.base_layer, self.name)

    def unmerge(self) -> None:
        """Put the base values back, to the bit."""
        if self.merged_adapters:
            with self._base_rows() as (rows, base):
                pass  # a copy; written once the weight is no longer gathered
            self.base.write_rows(rows, base)
            self.merged_adapters, self._replaced = [], torch.empty(0)
            if self.tied:
                self.base_layer.weight = self._shared

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's change as a dense matrix [out, in], fp32. Not for sharded weights."""
        idx, delta = self.params(adapter)
        dense = torch.zeros(self.out_features, self.in_features, dtype=delta.dtype, device=delta.device)
        return dense.scatter_(1, unpack_indices(idx), delta.detach())

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.unselected.discard(adapter_name)
        self.trained_on.pop(adapter_name, None)
        self.frozen.pop(adapter_name, None)
        self._whole_idx.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's, after low_cpu_mem_usage, casts to the weight's dtype too; deltas stay as precise as they were saved.
        with brought(self.base_layer):
            device = device or self.base.stored.device
        for param in self.params(adapter_name):
            if not param.is_meta and device.type != "meta":
                param.data = param.data.to(device)

    def params(self, adapter: str) -> list[nn.Parameter]:
        """The adapter's idx and delta."""
        return [self.neuroada_idx[adapter], self.neuroada_delta[adapter]]

    def _own_connections(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """idx [rows, k] int64 and delta [rows, k] of the rows this rank works on, of all the adapters side by side."""
        indices, deltas = [], []
        for adapter in adapters:
            idx_bytes, delta = self.params(adapter)
            with self.base.beside(idx_bytes) as (_, i), self.base.beside(delta) as (_, d):
                indices.append(unpack_indices(i))
                deltas.append(d.detach().clone())
        return torch.cat(indices, 1), torch.cat(deltas, 1)

    @contextmanager
    def _base_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """`own_rows` of the weight as it is without any merged adapter."""
        with self.base.own_rows() as (rows, weight):
            if self.merged_adapters:
                weight = weight.clone()
                idx, _ = self._own_connections(self.merged_adapters)
                write_entries(weight, idx, self._replaced.to(weight))
            yield rows, weight

    def check_fits(self, adapter: str, idx_bytes: torch.Tensor) -> None:
        """UserError where indices [out, 2k] uint8 of a file are those of a weight of another size."""
        idx = unpack_indices(idx_bytes)
        expected = (*self.base.neurons, sharding.shape(self.params(adapter)[0])[-1] // 2)
        if idx.shape != expected or int(idx.max()) >= self.in_features:
            raise UserError(
                f"adapter {adapter!r} does not fit the base model: {self.name} is {self.out_features} x "
                f"{self.in_features}, the adapter's indices are {tuple(idx.shape)} up to {int(idx.max())}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        for adapter in self.neuroada_idx:
            loaded = state_dict.get(f"{prefix}neuroada_idx.{adapter}.weight")
            if loaded is None:
                continue
            self.check_fits(adapter, loaded)
            self.unselected.discard(adapter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "neuroada." + super().__repr__()


def neuroada_layers(model: nn.Module) -> list[NeuroAdaLinear]:
    return [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
