"""transformers' own way of loading an adapter (`from_pretrained(adapter)`, pipelines, `model.load_adapter`).

It passes neither through PEFT's loading nor through `load_state_dict`. So its table of names learns ours, and what it
has loaded is checked as PEFT's is.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft.utils.transformers_weight_conversion as conversion
import torch
from transformers.integrations.peft import PeftAdapterMixin

from neuroada import sharding
from neuroada.adapter.config import NeuroAdaType
from neuroada.adapter.layer import neuroada_layers
from neuroada.adapter.loaded import check_fingerprint, check_tensors, discard
from neuroada.errors import UserError


def register() -> None:
    """Put both in place. Once in a process."""
    conversion.build_peft_weight_mapping = _with_our_names(conversion.build_peft_weight_mapping)
    PeftAdapterMixin.load_adapter = _checked(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]


def _with_our_names(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
        """transformers puts an adapter's name at the end of a key; ours is followed by `.weight`."""
        mapping = build(weight_conversions, adapter_name, peft_config=peft_config)
        if getattr(peft_config, "peft_type", None) == NeuroAdaType.NEUROADA:
            from transformers.core_model_loading import WeightRenaming

            theirs, ours = r"(neuroada_[^\.]*)", rf"\1.{adapter_name}.weight"
            mapping = [
                WeightRenaming(theirs, ours) if renaming.source_patterns == [theirs] else renaming
                for renaming in mapping
            ]
        return mapping

    return build_weight_mapping


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = inspect.signature(load).bind(self, *args, **kwargs).arguments.get("adapter_name") or "default"
        before = set(getattr(self, "peft_config", {}))
        try:
            info = load(self, *args, **kwargs)
        except RuntimeError as error:
            config = getattr(self, "peft_config", {}).get(adapter)
            if adapter in before or getattr(config, "peft_type", None) != NeuroAdaType.NEUROADA:
                raise
            discard(self, self.peft_config, adapter)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"adapter {adapter!r} does not fit the model ({reason}); load it over the base model that it was "
                f"trained on, or save it again"
            ) from error
        if adapter not in before and self.peft_config[adapter].peft_type == NeuroAdaType.NEUROADA:
            _check(self, adapter, info)
        return info

    return load_adapter


def _check(model: Any, adapter: str, info: Any) -> None:
    """`info`: transformers' account of the loading, its keys by the names of the model's parameters."""
    configs = model.peft_config
    layers = [layer for layer in neuroada_layers(model) if adapter in layer.neuroada_idx]
    if not all(sharding.is_whole(param) for layer in layers for param in layer.params(adapter)):
        return
    found = {
        name: param
        for name, param in model.named_parameters(remove_duplicate=False)
        if f".{adapter}." in name and name not in info.missing_keys
    }
    found |= {name: torch.empty(0) for name in info.unexpected_keys if ".neuroada_" in name}
    try:
        check_tensors(model, configs[adapter], adapter, found)
        for layer in layers:
            layer.is_selected(adapter)
        check_fingerprint(layers, adapter, configs[adapter])
    except UserError:
        discard(model, configs, adapter)
        raise
