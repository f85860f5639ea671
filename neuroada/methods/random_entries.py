"""Random entries without regard to neurons: drawn over each layer, each block of layers, or the whole network.

As many train as with NeuroAda's k of every neuron, but rows have unequal counts, and so have layers where a block or
the network is drawn over. They are stored as PEFT's SHiRA stores its own: fp32 values and [2, entries] int32 for each
layer, 12 bytes an entry. The saved adapter is one of SHiRA, which PEFT loads: every layer's length follows there from a
common r, so each is filled up with values of 0.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import ShiraConfig
from peft.tuners.shira import ShiraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from neuroada.errors import UserError
from neuroada.files import StoredTensor, open_tensors
from neuroada.methods.base import Change
from neuroada.methods.peft_method import KEY_PREFIX
from neuroada.methods.shira import Shira, set_entries


class RandomEntries(Shira):
    name = "random_entries"
    sizes = "k"
    follows = frozenset({"random_scope"})

    @property
    def scope(self) -> str:
        return self.adapter.random_scope or "layer"

    def describe(self) -> str:
        scope = {"layer": "each layer", "block": "each block", "network": "the network"}[self.scope]
        return f"random entries of {scope}, as many as k = {self.adapter.k} of every neuron"

    def config(self, task_type: str) -> ShiraConfig:
        return ShiraConfig(r=1, target_modules=self.targets, task_type=task_type)

    def attach_whole(self, model: nn.Module, task_type: str) -> nn.Module:
        tuned: Any = self.attach_without_mask(model, task_type)
        layers = {name: module for name, module in tuned.named_modules() if isinstance(module, ShiraLayer)}
        for number, scope in enumerate(self._scopes(list(layers))):
            for layer, entries in zip(scope, self._draw([layers[name] for name in scope], number), strict=True):
                if not entries.shape[1]:
                    raise UserError(
                        f"adapter.k = {self.adapter.k}: so few entries that {layer} has none; use a larger k, or "
                        f"adapter.random_scope = layer"
                    )
                set_entries(layers[layer], entries)
        r = max(-(-len(layer.shira_weight["default"]) // _sides(layer)) for layer in layers.values())
        if full := [
            name for name, layer in layers.items() if r * _sides(layer) > layer.out_features * layer.in_features
        ]:
            raise UserError(
                f"adapter.k = {self.adapter.k}: filled up to SHiRA's r = {r}, {full[0]} would have more entries than "
                f"its weight has; use a smaller k"
            )
        tuned.peft_config["default"].r = r
        return tuned

    def entries(self, layer: Any) -> torch.Tensor:
        """Drawn when the method was attached: the shapes were all it took."""
        return layer.shira_indices["default"]

    def complete(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        super().complete(model, tensors)
        peft_model: Any = model
        r = peft_model.peft_config["default"].r
        for name, layer in model.named_modules():
            if isinstance(layer, ShiraLayer):
                values, entries = tensors[f"{name}.shira_weight"], tensors[f"{name}.shira_indices"]
                missing = r * _sides(layer) - len(values)
                tensors[f"{name}.shira_weight"] = torch.cat([values, values.new_zeros(missing)])
                tensors[f"{name}.shira_indices"] = torch.cat([entries, entries[:, -1:].expand(2, missing)], 1)

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        """Without what fills a layer up: it repeats the last entry."""
        with open_tensors(saved / SAFETENSORS_WEIGHTS_NAME) as file:
            for change in super().changes(saved, base):
                entries = file.get_tensor(f"{KEY_PREFIX}{change.module}.shira_indices")
                yield change._replace(entries=entries.unique_consecutive(dim=1).shape[1])

    def _scopes(self, names: list[str]) -> list[list[str]]:
        """The layers' names in groups, each of which is drawn over as one. A block ends with the first number."""
        groups: dict[str, list[str]] = {}
        for name in names:
            block = re.match(r".*?\.\d+(?=\.)", name)
            key = {"layer": name, "block": block[0] if block else name, "network": ""}[self.scope]
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _draw(self, layers: list[Any], number: int) -> list[torch.Tensor]:
        """k entries for every row of all these layers, drawn together: [2, entries] int32 of each, in their order."""
        ends = np.cumsum([layer.out_features * layer.in_features for layer in layers])
        wanted = self.adapter.k * sum(layer.out_features for layer in layers)
        if wanted > ends[-1]:
            raise UserError(
                f"adapter.k = {self.adapter.k}: {wanted} entries, but a {self.scope} has {ends[-1]}; use a smaller k"
            )
        places = np.random.default_rng([self.seed, number]).choice(ends[-1], wanted, replace=False, shuffle=False)
        places.sort()
        drawn = []
        for layer, end in zip(layers, ends, strict=True):
            inside, places = np.split(places, [np.searchsorted(places, end)])
            first = end - layer.out_features * layer.in_features
            entries = np.stack(np.divmod(inside - first, layer.in_features))
            drawn.append(torch.from_numpy(entries).int())
        return drawn


def _sides(layer: Any) -> int:
    """Of a layer, in + out: SHiRA has r times as many entries."""
    return int(layer.in_features + layer.out_features)
