"""NeuroAda as a PEFT method whose tensors shard like any other weight, and recipes that run it anywhere.

    import neuroada                      # PEFT knows the method from here on
    from neuroada import NeuroAdaConfig

Importing PEFT takes seconds, which a command that only reads a recipe must not pay: the method is registered when PEFT
is there already, or else the moment somebody imports it. So is, with transformers, the way its from_pretrained opens a
folder that `neuroada quantise` wrote.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from neuroada.version import __version__ as __version__

__all__ = ["NeuroAdaConfig", "NeuroAdaModel", "hotswap_adapter", "select_by_activations", "select_by_gradient"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("neuroada.adapter"), name)
    raise AttributeError(f"module 'neuroada' has no attribute {name!r}")


class _RegisterAfter(MetaPathFinder, Loader):
    """Lets the import of `library` run as ever, then imports `ours`, which registers the method there."""

    def __init__(self, library: str, ours: str) -> None:
        self.library, self.ours = library, ours

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.library:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        sys.meta_path.insert(0, self)  # transformers asks for PEFT's spec long before anybody imports it
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


for library, ours in (("peft", "neuroada.adapter"), ("transformers.quantizers", "neuroada.hf.quantizer")):
    if library in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _RegisterAfter(library, ours))
