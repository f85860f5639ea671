"""The method as a PEFT tuner. Importing this package registers it with PEFT.

PEFT's own `register_peft_method` refuses names outside its closed enum, so the three tables it would fill are filled
here; everything in PEFT that looks a method up reads them (peft 0.21).
"""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from neuroada.adapter import foreign_weight as foreign_weight
from neuroada.adapter import transformers_loading
from neuroada.adapter.activation_selection import select_by_activations
from neuroada.adapter.config import NeuroAdaConfig, NeuroAdaType
from neuroada.adapter.gradient_selection import select_by_gradient
from neuroada.adapter.hotswap import hotswap_adapter
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.adapter.model import NeuroAdaModel

_TABLES: list[tuple[dict[Any, Any], Any]] = [
    (PEFT_TYPE_TO_CONFIG_MAPPING, NeuroAdaConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, NeuroAdaModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, "neuroada_"),
]
for table, entry in _TABLES:
    table[NeuroAdaType.NEUROADA] = entry

transformers_loading.register()

__all__ = [
    "NeuroAdaConfig",
    "NeuroAdaLinear",
    "NeuroAdaModel",
    "hotswap_adapter",
    "select_by_activations",
    "select_by_gradient",
]
