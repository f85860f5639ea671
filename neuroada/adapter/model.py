"""NeuroAda as a PEFT tuner."""

import difflib
import re
from collections import Counter
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.default_targets import TARGET_MODULES, TARGET_PARAMETERS
from neuroada.adapter.experts import NeuroAdaExperts
from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.errors import UserError


class NeuroAdaModel(BaseTuner):
    """Wraps every target Linear of a model in a `NeuroAdaLinear` and freezes the rest."""

    prefix = "neuroada_"
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
        if config.target_parameters and config.selection == "gradient":
            raise UserError(
                "selection = 'gradient', or a selection file: not for experts (target_parameters), of which a batch "
                "reaches a few; use magnitude, or name target_modules alone"
            )
        return super()._prepare_adapter_config(config, model_config)

    def layers(self, adapter: str) -> list[NeuroAdaLinear]:
        """The layers that carry this adapter, in the model's order."""
        found = [module for module in self.model.modules() if isinstance(module, NeuroAdaLinear)]
        return [layer for layer in found if adapter in layer.neuroada_idx]

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Refuse targets that match nothing before any layer is replaced."""
        shared = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
        self._tied = {key for key, uses in shared.items() if uses > 1}
        names = [name for name, _ in model.named_modules()]
        targets = cast(NeuroAdaConfig, peft_config).target_modules
        if targets == "all-linear":
            return
        if isinstance(targets, str):
            if not any(re.fullmatch(targets, name) for name in names):
                raise UserError(f"target_modules = {targets!r}: this expression matches no module of the model")
            return
        linears = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        parameters = [name for name, _ in model.named_parameters()]
        for target in cast(NeuroAdaConfig, peft_config).target_parameters or []:
            if not any(f".{name.replace('.base_layer', '')}".endswith(f".{target}") for name in parameters):
                raise UserError(f"target_parameters: {target!r} matches no parameter of the model")
        for target in targets or []:
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
        elif not isinstance(target, NeuroAdaLinear):
            self._check_target(current_key, target, parent)
            wrapped = NeuroAdaLinear(target, current_key)
            wrapped.add_adapter(adapter_name, config)
            wrapped.train(target.training)
            self._replace_module(parent, target_name, wrapped, target)
        else:
            target.add_adapter(adapter_name, config)

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
        if wrapped is None:
            self._replace_module(parent, target_name, made, target)

    def _check_target(self, name: str, target: nn.Module, parent: nn.Module) -> None:
        problem = ""
        if isinstance(parent, nn.MultiheadAttention):
            problem = "is read by MultiheadAttention past its forward"
        elif id(getattr(target, "weight", None)) in self._tied:
            problem = "shares its weight with another module, which would change with it"
        if problem:
            raise UserError(f"target_modules: {name} {problem}; leave it out of target_modules")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's moves the adapter to the weight's device: meta, if that is offloaded. Ours is made where it runs.
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        for module in self.model.modules():
            if isinstance(module, NeuroAdaLinear):
                module.enable_adapters(False)
        return super().unload()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """What an adapter's file holds; its base's fingerprint goes into the configuration, which PEFT writes next."""
        layers = [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
        cast(NeuroAdaConfig, config).base_fingerprint = fingerprint(layers, adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    def _check_fingerprints(self, _: Any) -> None:
        """After a file was loaded: refuse an adapter that was trained on other base weights."""
        for adapter, peft_config in self.peft_config.items():
            config, layers = cast(NeuroAdaConfig, peft_config), self.layers(adapter)
            if config.base_fingerprint is None or any(adapter in layer.unselected for layer in layers):
                continue
            if (found := fingerprint(layers, adapter)) != config.base_fingerprint:
                raise UserError(
                    f"adapter {adapter!r} was trained on other base weights (base_fingerprint "
                    f"{config.base_fingerprint}, here {found}): load it over the base model it names, or set "
                    f"base_fingerprint to null in its adapter_config.json"
                )
