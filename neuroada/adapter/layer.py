"""The in-weight layer: a Linear, and for each adapter its indices, base values and deltas, cut as the weight is cut."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from neuroada import sharding
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.selection import select_top_k
from neuroada.errors import UserError
from neuroada.ops import MAX_IN_FEATURES, in_weight_linear, pack_indices, unpack_indices, write_entries


class NeuroAdaLinear(nn.Module, BaseTunerLayer):
    """Wraps a Linear. While an adapter is active its values stand in the weight itself.

    For each adapter, parameters of [out_features, .]: `neuroada_idx` (2k uint8: k uint16 column numbers),
    `neuroada_base` (k, the weight's own values there, in its dtype: what makes disabling, switching and unmerging exact
    to the bit) and `neuroada_delta` (k, fp32, the only one that trains).
    """

    adapter_layer_names = ("neuroada_delta",)  # set_adapter turns gradients on for these: floating point only
    other_param_names = ("neuroada_idx", "neuroada_base")

    def __init__(self, base_layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.neuroada_idx = nn.ParameterDict()
        self.neuroada_base = nn.ParameterDict()
        self.neuroada_delta = nn.ParameterDict()
        self.unselected: set[str] = set()  # adapters whose connections are still to be chosen or loaded
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

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
        self._restore()
        weight = self.base_layer.weight
        rows, k = self.out_features, config.k
        idx = torch.zeros(rows, 2 * k, dtype=torch.uint8, device=weight.device)
        base = torch.zeros(rows, k, dtype=weight.dtype, device=weight.device)
        delta = torch.zeros(rows, k, dtype=torch.float32, device=weight.device)
        self.neuroada_idx[adapter] = nn.Parameter(idx, requires_grad=False)
        self.neuroada_base[adapter] = nn.Parameter(base, requires_grad=False)
        self.neuroada_delta[adapter] = nn.Parameter(delta)
        sharding.adopt(self, weight, self._params(adapter))
        self.unselected.add(adapter)
        loading = config.base_fingerprint is not None or self._params(adapter)[0].is_meta
        if not loading and config.selection != "gradient":
            self.select(adapter, config)

    def select(self, adapter: str, config: NeuroAdaConfig) -> None:
        """Choose the adapter's connections from the weight. Collective where the weight is sharded."""
        with sharding.own_rows(self.base_layer.weight) as (rows, weight):
            idx = select_top_k(weight, config.k, config.selection, first_row=rows.start, seed=config.seed)
            self.set_connections(adapter, rows, idx, weight)

    def set_connections(self, adapter: str, rows: slice, idx: torch.Tensor, weight: torch.Tensor) -> None:
        """Store `rows` of the indices, [rows, k] int64, and of the base values found there in `weight`, [rows, in]."""
        base = weight.gather(1, idx)
        if not torch.isfinite(base).all():
            raise UserError(f"{self.name}.weight holds values that are not finite: the base checkpoint is damaged")
        sharding.write_rows(self.neuroada_idx[adapter], rows, pack_indices(idx))
        sharding.write_rows(self.neuroada_base[adapter], rows, base)
        self.unselected.discard(adapter)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        active = self._active()
        for adapter in self.neuroada_idx:
            # A gathered copy that stays gathered may still hold another adapter's values.
            if adapter != active and adapter not in self.unselected:
                write_entries(weight, self.neuroada_idx[adapter], self.neuroada_base[adapter])
        if active is None:
            return nn.functional.linear(x, weight, bias)
        if active in self.unselected:
            raise RuntimeError(
                f"adapter {active!r} has no connections in {self.name} yet: load its file, call select_by_gradient "
                f"(selection = gradient), or start a new one with base_fingerprint = None"
            )
        idx, base, delta = self._params(active)
        return in_weight_linear(x, weight, bias, idx, base, delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapter's values into the weight to stay, until `unmerge`; the same bits that forward uses."""
        names = [name for name in (adapter_names or self.active_adapters) if name in self.neuroada_delta]
        if not names or names == self.merged_adapters:
            return
        if len(names) > 1 or self.merged_adapters:
            raise UserError(f"adapters {self.merged_adapters + names}: NeuroAda merges one at a time; unmerge first")
        (adapter,) = names
        self._restore()
        idx, base, delta = self._params(adapter)
        with sharding.own_rows(idx) as (rows, i), sharding.own_rows(base) as (_, b), sharding.own_rows(delta) as (_, d):
            if safe_merge and not torch.isfinite(b + d).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            with sharding.own_rows(self.base_layer.weight) as (_, weight):
                merged = weight.clone()
                write_entries(merged, i, b, d)
        sharding.write_rows(self.base_layer.weight, rows, merged)
        self.merged_adapters = [adapter]

    def unmerge(self) -> None:
        """Put the base values back, to the bit."""
        if not self.merged_adapters:
            return
        idx, base, _ = self._params(self.merged_adapters.pop())
        whole = sharding.own_rows(self.base_layer.weight)
        with sharding.own_rows(idx) as (rows, i), sharding.own_rows(base) as (_, b), whole as (_, weight):
            restored = weight.clone()
            write_entries(restored, i, b)
        sharding.write_rows(self.base_layer.weight, rows, restored)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise UserError(f"adapters {adapter_names}: NeuroAda runs one at a time; activate a single one")
        super().set_adapter(adapter_names, inference_mode)
        self._restore()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.unmerge()
        self._restore()

    def delete_adapter(self, adapter_name: str) -> None:
        self._restore()
        super().delete_adapter(adapter_name)
        self.unselected.discard(adapter_name)

    def _active(self) -> str | None:
        names = [name for name in self.active_adapters if name in self.neuroada_delta]
        if self.merged_adapters:
            return self.merged_adapters[0]
        return names[0] if names and not self.disable_adapters else None

    def _params(self, adapter: str) -> list[nn.Parameter]:
        # Through _parameters: the plain look-up would make ZeRO-3 gather them.
        dicts = (self.neuroada_idx, self.neuroada_base, self.neuroada_delta)
        return [holder._parameters[adapter] for holder in dicts]  # type: ignore[misc]

    def _restore(self) -> None:
        """Give a whole weight its base values back, as if no forward had run. Sharded ones were never written."""
        weight = self.base_layer.weight
        if self.merged_adapters or not sharding.is_whole(weight) or weight.is_meta:
            return
        for adapter in self.neuroada_idx:
            idx, base, _ = self._params(adapter)
            if adapter not in self.unselected and sharding.is_whole(idx) and not idx.is_meta:
                write_entries(weight, idx, base)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """An adapter's file holds indices and deltas; the base values are read from the weight it is loaded on."""
        self._restore()
        for adapter in self.neuroada_idx:
            loaded = state_dict.get(f"{prefix}neuroada_idx.{adapter}")
            if loaded is None:
                continue
            idx = unpack_indices(loaded).to(self.base_layer.weight.device)
            expected = (self.out_features, self.neuroada_idx[adapter].shape[1] // 2)
            if idx.shape != expected or int(idx.max()) >= self.in_features:
                raise UserError(
                    f"adapter {adapter!r} does not fit the base model: {self.name} is {self.out_features} x "
                    f"{self.in_features}, the adapter's indices are {tuple(idx.shape)} up to {int(idx.max())}"
                )
            state_dict[f"{prefix}neuroada_base.{adapter}"] = self.base_layer.weight.data.gather(1, idx)
            self.unselected.discard(adapter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "neuroada." + super().__repr__()
