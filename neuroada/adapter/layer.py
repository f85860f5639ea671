"""The in-weight layer: a Linear, and for each adapter its indices and deltas, cut as the weight is cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from neuroada import sharding
from neuroada.adapter.base_weight import base_weight
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.hooks import brought, call_with_hooks, has_hooks
from neuroada.adapter.selection import select_top_k
from neuroada.errors import UserError
from neuroada.ops import (
    MAX_IN_FEATURES,
    adapted,
    in_weight_linear,
    pack_indices,
    read_entries,
    unpack_indices,
    write_entries,
)


class NeuroAdaLinear(nn.Module, BaseTunerLayer):
    """Wraps a Linear, whose weight keeps the base values but while merged: a pass never writes into it.

    For each adapter, parameters of [out_features, .]: `neuroada_idx` (2k uint8: k uint16 column numbers) and
    `neuroada_delta` (k, fp32, the only one that trains).
    """

    adapter_layer_names = ("neuroada_delta",)  # set_adapter turns gradients on for these: floating point only
    other_param_names = ("neuroada_idx",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.name = name
        self.base = base_weight(base_layer, name)
        self.in_features, self.out_features = self.base.in_features, self.base.out_features
        self.neuroada_idx = nn.ParameterDict()
        self.neuroada_delta = nn.ParameterDict()
        self.unselected: set[str] = set()  # adapters whose connections are still to be chosen or loaded
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._replaced = torch.empty(0)  # the base values that `merge` wrote over, of this rank's rows

    def add_adapter(self, adapter: str, config: NeuroAdaConfig) -> None:
        """Make the adapter's parameters and, where they can be now, choose its connections.

        Connections come later on the meta device (`select`, once the weights are there), for selection = gradient
        (`select_by_gradient`) and for an adapter that is being loaded (its file holds them).
        """
        if config.k > self.in_features:
            raise UserError(
                f"k = {config.k}: {self.name} has only {self.in_features} inputs; choose k <= {self.in_features} or "
                f"leave it out with exclude_modules"
            )
        if self.in_features > MAX_IN_FEATURES:
            raise UserError(
                f"target_modules: {self.name} has {self.in_features} inputs; indices of two bytes reach "
                f"{MAX_IN_FEATURES}: leave it out with exclude_modules"
            )
        neurons, k = self.base.neurons, config.k
        with brought(self.base_layer):  # an offloaded weight's device is that of its passes
            weight = self.base.stored
            idx = torch.zeros(*neurons, 2 * k, dtype=torch.uint8, device=weight.device)
            delta = torch.zeros(*neurons, k, dtype=torch.float32, device=weight.device)
            self.neuroada_idx[adapter] = nn.Parameter(idx, requires_grad=False)
            self.neuroada_delta[adapter] = nn.Parameter(delta)
            sharding.adopt(self, weight, self._params(adapter))
        self.unselected.add(adapter)
        loading = config.base_fingerprint is not None or self._params(adapter)[0].is_meta
        if not loading and config.selection != "gradient":
            self.select(adapter, config)

    def select(self, adapter: str, config: NeuroAdaConfig) -> None:
        """Choose the adapter's connections from the weight. Collective where the weight is sharded."""
        with self._base_rows() as (rows, weight):
            idx = select_top_k(weight, config.k, config.selection, first_row=rows.start, seed=config.seed)
            self.set_connections(adapter, rows, idx, weight)

    def set_connections(self, adapter: str, rows: slice, idx: torch.Tensor, weight: torch.Tensor) -> None:
        """Store `rows` of the indices, [rows, k] int64; `weight` holds those rows of the base, [rows, in]."""
        if not torch.isfinite(read_entries(weight, idx)).all():
            raise UserError(f"{self.name}.weight holds values that are not finite: the base checkpoint is damaged")
        self.base.write_beside(self._params(adapter)[0], rows, pack_indices(idx))
        self.unselected.discard(adapter)

    def base_values(self, adapter: str) -> torch.Tensor:
        """The base's values at the adapter's connections, [out_features, k], on every rank. Collective if sharded."""
        with self._base_rows() as (_, weight), self.base.beside(self._params(adapter)[0]) as (_, idx):
            return self.base.join_rows(read_entries(weight, unpack_indices(idx)))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self.active_in_pass()
        if active is None:
            return self.base_layer(x, *args, **kwargs)
        if not (has_hooks(self.base_layer) or has_hooks(self.neuroada_delta)):
            return self._adapted(x, active)
        with brought(self.neuroada_idx, self.neuroada_delta):
            return call_with_hooks(self.base_layer, lambda x: self._adapted(x, active), x)

    def active_in_pass(self) -> str | None:
        """The adapter that a pass computes with now; None: the base alone, into which one may be merged."""
        carried = self.neuroada_delta._parameters  # quicker than the dictionary itself, at every token
        active = next((name for name in self.active_adapters if name in carried), None)
        if active is None or self.disable_adapters or self.merged_adapters:
            return None
        if active in self.unselected:
            raise RuntimeError(
                f"adapter {active!r} has no connections in {self.name} yet: load its file, call select_by_gradient "
                f"(selection = gradient), or start a new one with base_fingerprint = None"
            )
        return active

    def _adapted(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        idx, delta = self._params(adapter)
        return in_weight_linear(x, self.base.stored, self.base.bias, idx, delta, self.base.format)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapter's values into the weight to stay, until `unmerge`; the same bits that forward uses."""
        names = [name for name in (adapter_names or self.active_adapters) if name in self.neuroada_delta]
        if not names or names == self.merged_adapters:
            return
        if len(names) > 1 or self.merged_adapters:
            raise UserError(f"adapters {self.merged_adapters + names}: NeuroAda merges one at a time; unmerge first")
        (adapter,) = names
        idx_bytes, delta = self._params(adapter)
        with (
            self.base.beside(idx_bytes) as (_, i),
            self.base.beside(delta) as (_, d),
            self._base_rows() as (rows, w),
        ):
            merged, idx = w.clone(), unpack_indices(i)
            replaced = read_entries(merged, idx)
            values = adapted(replaced, d)
        if safe_merge and not torch.isfinite(values).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        write_entries(merged, idx, values)
        # First the note, then the weight: an interruption between leaves what `unmerge` puts right.
        self.merged_adapters, self._replaced = [adapter], replaced
        try:
            self.base.write_rows(rows, merged)
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Put the base values back, to the bit."""
        if self.merged_adapters:
            with self._base_rows() as (rows, base):
                pass  # a copy; written once the weight is no longer gathered
            self.base.write_rows(rows, base)
            self.merged_adapters, self._replaced = [], torch.empty(0)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise UserError(f"adapters {adapter_names}: NeuroAda runs one at a time; activate a single one")
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.unselected.discard(adapter_name)

    def _params(self, adapter: str) -> list[nn.Parameter]:
        # Through _parameters: the plain look-up would make ZeRO-3 gather them.
        dicts = (self.neuroada_idx, self.neuroada_delta)
        return [holder._parameters[adapter] for holder in dicts]  # type: ignore[misc]

    @contextmanager
    def _base_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """`own_rows` of the weight as it is without any merged adapter."""
        with self.base.own_rows() as (rows, weight):
            for adapter in self.merged_adapters:
                with self.base.beside(self._params(adapter)[0]) as (_, idx):
                    weight = weight.clone()
                    write_entries(weight, unpack_indices(idx), self._replaced.to(weight))
            yield rows, weight

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        for adapter in self.neuroada_idx:
            loaded = state_dict.get(f"{prefix}neuroada_idx.{adapter}")
            if loaded is None:
                continue
            idx = unpack_indices(loaded)
            expected = (*self.base.neurons, sharding.shape(self._params(adapter)[0])[-1] // 2)
            if idx.shape != expected or int(idx.max()) >= self.in_features:
                raise UserError(
                    f"adapter {adapter!r} does not fit the base model: {self.name} is {self.out_features} x "
                    f"{self.in_features}, the adapter's indices are {tuple(idx.shape)} up to {int(idx.max())}"
                )
            self.unselected.discard(adapter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "neuroada." + super().__repr__()
