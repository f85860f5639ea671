"""neuron_fraction: only a part of each layer's neurons trains; the others keep deltas of exactly 0.

The parameters stay [out, .], sharded as the weight is, so that files, merging and kernels know nothing of it. A frozen
neuron's deltas get a gradient of 0: AdamW's moments, its weight decay and its update then leave them at 0.
"""

import re
import zlib
from typing import TYPE_CHECKING, Literal

import torch

from neuroada.ops.selection import scramble

if TYPE_CHECKING:
    from neuroada.adapter.config import NeuroAdaConfig
    from neuroada.adapter.layer import NeuroAdaLinear

NeuronChoice = Literal["random", "norm"]


def frozen_count(neurons: int, fraction: float) -> int:
    """How many of a layer's neurons do not train; rounded as by certainCell of the authors' code."""
    return int((1 - fraction) * neurons)


def frozen_neurons(layer: "NeuroAdaLinear", config: "NeuroAdaConfig") -> torch.Tensor:
    """Which neurons do not train, [out] bool, all of them on every rank. Collective where the weight is sharded.

    random: by the seed and the layer's place in the model alone. norm: those whose rows of the base weight have the
    smallest L2 norms; of equal norms the lower row trains.
    """
    if config.neuron_choice == "random":
        strength = scramble(torch.arange(layer.out_features), config.seed + (_place(layer.name) << 32))
    else:
        strength = layer.base_norms().cpu()
    order = strength.sort(descending=True, stable=True).indices
    trained = layer.out_features - frozen_count(layer.out_features, config.neuron_fraction)
    frozen = torch.ones(layer.out_features, dtype=torch.bool)
    frozen[order[:trained]] = False
    return frozen


def _place(name: str) -> int:
    """Of a layer, in 32 bits: its numbers and its last name, which stay when the model is wrapped in another."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")
    return zlib.crc32(".".join((*numbers, name.rpartition(".")[2])).encode())
