"""NeuroAda as a PEFT tuner."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from neuroada import sharding
from neuroada.adapter import mixed
from neuroada.adapter.adapter_file import sha256_of
from neuroada.adapter.combine import add_weighted_adapter
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.default_targets import TARGET_MODULES, TARGET_PARAMETERS
from neuroada.adapter.experts import NeuroAdaExperts
from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.layer import UNSELECTED, NeuroAdaLinear, neuroada_layers
from neuroada.adapter.loaded import check_fingerprint, check_tensors, discard, note_fingerprint
from neuroada.adapter.selection import FROM_EXAMPLES
from neuroada.errors import UserError
from neuroada.quantised import QuantisedLinear, declare_dense


class NeuroAdaModel(BaseTuner):
    """Wraps every target Linear of a model in a `NeuroAdaLinear` and freezes the rest."""

    prefix = "neuroada_delta"  # of what trains; the indices beside it keep their own dtype
    tuner_layer_cls = NeuroAdaLinear
    target_module_mapping = TARGET_MODULES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(NeuroAdaModel._check_fingerprints)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(NeuroAdaConfig, peft_config)
        if config.target_modules is None:
            if config.target_parameters is not None:
                config.target_modules = []
            else:
                config.target_parameters = TARGET_PARAMETERS.get(model_config.get("model_type", ""))
        if config.target_parameters and config.selection in FROM_EXAMPLES:
            raise UserError(
                f"selection = {config.selection!r}, or a selection file: not for experts (target_parameters), of which "
                f"a batch reaches a few; use magnitude, or name target_modules alone"
            )
        if config.target_parameters and config.neuron_fraction < 1:
            raise UserError(
                f"neuron_fraction = {config.neuron_fraction}: not for experts (target_parameters); name target_modules "
                f"alone"
            )
        return super()._prepare_adapter_config(config, model_config)

    def adapted_layers(self, adapter: str) -> list[NeuroAdaLinear]:
        """The layers that carry this adapter, in the model's order."""
        return [layer for layer in neuroada_layers(self.model) if adapter in layer.neuroada_idx]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            discard(model, self.peft_config, adapter_name)
            raise
        self.record_fingerprint(adapter_name)

    def record_fingerprint(self, adapter: str) -> None:
        """Note the checksum of the base under the adapter's connections, for its file. Collective if sharded.

        At once, not when it is saved: trainers save on rank 0 alone.
        """
        layers = self.adapted_layers(adapter)
        if layers and all(layer.is_known(adapter) for layer in layers):
            note_fingerprint(layers, adapter, fingerprint(layers, adapter))
            for layer in layers:
                layer.keep_copy(adapter)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Refuse targets that match nothing before any layer is replaced."""
        shared = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
        self._tied = {key for key, uses in shared.items() if uses > 1}
        names = [name for name, _ in model.named_modules()]
        targets = cast(NeuroAdaConfig, peft_config).target_modules
        if isinstance(targets, str):
            everything = targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND or targets == DUMMY_TARGET_MODULES
            if not everything and not any(re.fullmatch(targets, name) for name in names):
                raise UserError(f"target_modules = {targets!r}: this expression matches no module of the model")
            if targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
                _include_quantised(cast(NeuroAdaConfig, peft_config), model)
            return
        linears = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        parameters = [name for name, _ in model.named_parameters()]
        for target in cast(NeuroAdaConfig, peft_config).target_parameters or []:
            if not any(f".{name.replace('.base_layer', '')}".endswith(f".{target}") for name in parameters):
                raise UserError(f"target_parameters: {target!r} matches no parameter of the model")
        for target in sorted(targets or []):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                near = difflib.get_close_matches(target, linears, n=3, cutoff=0.4) or linears
                raise UserError(
                    f"target_modules: {target!r} matches no module of the model; its Linear modules include "
                    f"{', '.join(near[:8]) or 'none'}"
                )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(NeuroAdaConfig, peft_config)
        if parameter_name is not None:
            self._adapt_experts(config, adapter_name, target, target_name, parent, current_key, parameter_name)
            return
        if isinstance(target, NeuroAdaLinear):
            target.add_adapter(adapter_name, config)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise UserError(
                f"target_modules: {current_key} is read by MultiheadAttention past its forward; leave it out of "
                f"target_modules"
            )
        wrapped = NeuroAdaLinear(target, current_key, tied=id(getattr(target, "weight", None)) in self._tied)
        wrapped.add_adapter(adapter_name, config)
        wrapped.train(target.training)
        if adapter_name not in self.active_adapters:
            wrapped.requires_grad_(False)  # as PEFT: a further adapter trains once it is activated
        self._replace_module(parent, target_name, wrapped, target)

    def _adapt_experts(
        self,
        config: NeuroAdaConfig,
        adapter: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
        parameter: str,
    ) -> None:
        # PEFT finds a parameter's module again, inside its wrapper, for the second parameter and the second adapter.
        wrapped = next((module for module in (target, parent) if isinstance(module, NeuroAdaExperts)), None)
        made = wrapped or NeuroAdaExperts(target)
        layer = made.adapt(parameter, key)
        layer.add_adapter(adapter, config)
        layer.train(target.training)
        if adapter not in self.active_adapters:
            layer.requires_grad_(False)
        if wrapped is None:
            self._replace_module(parent, target_name, made, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's moves the adapter to the weight's device: meta, if that is offloaded. Ours is made where it runs.
        setattr(parent, child_name, new_module)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().merge_and_unload(*args, **kwargs)
        declare_dense(model)
        return model

    def unload(self) -> nn.Module:
        for layer in neuroada_layers(self.model):
            layer.enable_adapters(False)
        return super().unload()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names` of a forward or generate: PEFT calls this around it."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in neuroada_layers(self.model) for name in layer.neuroada_idx}
        if unknown := sorted(set(names) - known - {mixed.BASE}):
            raise UserError(f"adapter_names: {', '.join(unknown)} not among the model's ({', '.join(sorted(known))})")
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        handles = [
            wrapper.register_forward_pre_hook(partial(_name_rows, list(names)), with_kwargs=True)
            for wrapper in wrappers
        ]
        try:
            with mixed.mixture(names):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """A new adapter over the union of the connections of others: see `neuroada.adapter.combine`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, density, majority_sign_method)
        self.record_fingerprint(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """What an adapter's file holds. Nothing here is collective: transformers' Trainer calls it on rank 0 alone."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = {name: layer for name, layer in _named_layers(model) if adapter_name in layer.neuroada_idx}
        for name, layer in layers.items():
            key = f"{name}.neuroada_idx.{adapter_name}.weight"
            if key not in found:  # ZeRO-3's gathering for a file leaves frozen parameters out
                found[key] = layer.own_copy(adapter_name)
            delta_key = f"{name}.neuroada_delta.{adapter_name}.weight"
            if delta_key in found:
                found[delta_key] = found[delta_key].float()  # in files always: exact
            if not (found[key] != UNSELECTED).any():
                raise UserError(
                    f"adapter {adapter_name!r} has no connections in {layer.name} yet, so there is nothing to save: "
                    f"call select_by_gradient (selection = gradient) or select_by_activations (wanda), or load its file"
                )
        noted = {layer.trained_on.get(adapter_name) for layer in layers.values()}
        if None in noted and all(sharding.is_whole(layer.neuroada_idx[adapter_name]) for layer in layers.values()):
            noted = {fingerprint(layers.values(), adapter_name)}
        # PEFT writes the configuration next: notes for that one time, for the object is the caller's.
        noting = cast(NeuroAdaConfig, config)
        noting.trained_on = noted.pop() if len(noted) == 1 else None
        noting.saved_sha256 = sha256_of(found, adapter_name)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """...neuroada_delta.<adapter>.weight -> ...neuroada_delta."""
        clean = super()._remove_adapter_name_from_key(key, adapter_name)
        return clean.removesuffix(".weight") if ".neuroada_" in key else clean

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are fp32; with autocast_adapter_dtype = False in the dtype of a weight of 16 bits, and their moments
        with them, where a small change may vanish."""
        for layer in self.adapted_layers(adapter_name):
            follows = not autocast_adapter_dtype and layer.base.stored.dtype in (torch.float16, torch.bfloat16)
            layer.neuroada_delta.holder(adapter_name).to(layer.base.stored.dtype if follows else torch.float32)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """By the names of the model's parameters, which PEFT loads next: checked here, before anything is written."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, cast(NeuroAdaConfig, config), adapter_name, found)
        return found

    def _check_fingerprints(self, _: Any) -> None:
        """After a file was loaded: refuse an adapter that was trained on other base weights."""
        for adapter, config in list(self.peft_config.items()):
            try:
                check_fingerprint(self.adapted_layers(adapter), adapter, cast(NeuroAdaConfig, config))
            except UserError:
                discard(self.model, self.peft_config, adapter)
                raise


def _include_quantised(config: NeuroAdaConfig, model: nn.Module) -> None:
    """ "all-linear" over a quantised base: PEFT takes it for its own list of classes, in which ours is not."""
    quantised = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    if quantised:
        _maybe_include_all_linear_layers(config, model)
        quantised = {name for name in quantised if not name.endswith(".base_layer")}
        config.target_modules = sorted(quantised.union(config.target_modules or ()))


def _named_layers(model: nn.Module) -> list[tuple[str, NeuroAdaLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, NeuroAdaLinear)]


def _name_rows(names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """PEFT's own wrappers (modules_to_save, trainable tokens) take the names as an argument; in this thread only."""
    if mixed.current() is not None:
        kwargs["adapter_names"] = names
    return args, kwargs
