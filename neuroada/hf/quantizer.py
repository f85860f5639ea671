"""What transformers' `from_pretrained` needs to open a folder that `neuroada quantise` wrote.

Importing this module registers the method with transformers; `neuroada` does so once transformers' quantizers are
imported. The model then has the same packed layers as by neuroada's own loading, whole in one process (engines that
shard load by `neuroada.hf.quantised`). Without neuroada the folder's config.json makes from_pretrained raise.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from neuroada import sharding
from neuroada.errors import UserError
from neuroada.files import read_header
from neuroada.files.names import match
from neuroada.hf.quantised_config import GUARD, KEY
from neuroada.quantised import METHOD, Quantisation, QuantisedLinear, dequantise, quantise


@register_quantization_config(METHOD)
class NeuroAdaQuantizationConfig(QuantizationConfigMixin):
    """config.json's quantization_config, as an object. UserError: not what `neuroada quantise` wrote."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # registered names are no members of the enum
        self.quantisation = Quantisation.from_json(values, KEY)

    def to_dict(self) -> dict[str, Any]:
        return self.quantisation.as_json()


@register_quantizer(METHOD)
class NeuroAdaQuantizer(HfQuantizer):
    """Puts packed layers in the place of the Linears; their bytes are loaded as any parameter."""

    quantization_config: NeuroAdaQuantizationConfig
    requires_calibration = True  # transformers' word for: opens what is quantised already, and quantises nothing

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the weight files are looked for: takes out the entry that stops whoever lacks this class."""
        if hasattr(config, GUARD):
            delattr(config, GUARD)
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        quantise(model, self.quantization_config.quantisation)
        _check_stored(model, checkpoint_files or ())
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        """UserError: a rank stores a part of the rows, which would make a part of the dense layer."""
        for name, module in model.named_modules():
            if isinstance(module, QuantisedLinear) and not sharding.is_whole(module.packed):
                raise UserError(f"{name}: a quantised weight that is sharded is not made dense; load it in one process")
        return dequantise(model)

    def is_serializable(self) -> bool:
        """No: transformers takes the guard out of what it saves, and the folder written once is there already."""
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # by adapters


def declare_quantised(model: Any, quantisation: Quantisation) -> None:
    """Tell transformers that a model which it did not load is quantised: its save_pretrained refuses it then.

    What it would write has an ordinary config.json, over which transformers starts from random weights.
    """
    model.config.quantization_config = NeuroAdaQuantizationConfig(**quantisation.as_json())
    model.hf_quantizer = NeuroAdaQuantizer(model.config.quantization_config)


def _check_stored(model: nn.Module, files: Iterable[str]) -> None:
    """UserError: a packed matrix that the files lack, which transformers would make up and only warn of."""
    stored = {tensor.name for path in files for tensor in read_header(Path(path))[0]}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear) and match(f"{name}.packed", stored) is None:
            raise UserError(
                f"{KEY}: config.json says {module.quantisation.describe()}, but the files hold no {name}.packed; "
                f"quantise the original checkpoint again"
            )
