"""vLLM's files that need no GPU, loaded by path from an installed vLLM, whose own import wants one; else a stand-in.

The stand-in has the signatures of vLLM 0.33.0, read from its source; test_vllm.py compares an installed one's.
"""

import ast
import importlib.util
import math
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import torch

SIGNATURES = {
    "distributed/weight_transfer/base.py": {
        "WeightTransferEngine.__init__": ["self", "config", "vllm_config", "device", "model"],
        "WeightTransferEngine.parse_init_info": ["self", "init_dict"],
        "WeightTransferEngine.parse_update_info": ["self", "update_dict"],
        "WeightTransferEngine.init_transfer_engine": ["self", "init_info"],
        "WeightTransferEngine.start_weight_update": ["self"],
        "WeightTransferEngine.finish_weight_update": ["self"],
        "WeightTransferEngine.update_weights": ["self", "update_info"],
        "WeightTransferEngine.receive_weights": ["self", "update_info"],
        "WeightTransferEngine.shutdown": ["self"],
        "VLLMWeightSyncClient.start_weight_update": ["self"],
        "VLLMWeightSyncClient.update_weights": ["self", "update_info"],
        "VLLMWeightSyncClient.finish_weight_update": ["self", "weight_version"],
    },
    "distributed/weight_transfer/factory.py": {
        "WeightTransferEngineFactory.register_engine": ["cls", "name", "module_path_or_cls", "class_name"],
        "WeightTransferEngineFactory.create_engine": ["cls", "config", "vllm_config", "device", "model"],
    },
    "model_executor/model_loader/checkpoint_weight_patch.py": {
        "load_checkpoint_weight_patches": ["model", "patches", "max_chunk_bytes", "validate_unique_indices"],
    },
}
ABSTRACT = {"init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"}
PATCH = "model_executor/model_loader/checkpoint_weight_patch.py"


def installed() -> Path | None:
    """vLLM's folder, without importing it."""
    spec = importlib.util.find_spec("vllm") if "vllm" not in sys.modules else None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def signatures(path: Path) -> dict[str, list[str]]:
    """The names of every function's arguments in a file."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef):
                arguments = [*member.args.posonlyargs, *member.args.args, *member.args.kwonlyargs]
                found[prefix + member.name] = [argument.arg for argument in arguments]
    return found


def abstract_methods(path: Path, name: str) -> set[str]:
    (found,) = (
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
    )
    return {
        member.name
        for member in found.body
        if isinstance(member, ast.FunctionDef) and any("abstractmethod" in ast.dump(d) for d in member.decorator_list)
    }


def load_real_patches(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoint_weight_patch", folder / PATCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in_patches() -> ModuleType:
    """By the contract of vLLM's: a full tensor in which NaN means unchanged goes through `load_weights`."""
    module = ModuleType("checkpoint_weight_patch")
    module.CheckpointWeightPatch = namedtuple("CheckpointWeightPatch", ["name", "shape", "dtype", "values", "indices"])

    def load_checkpoint_weight_patches(model, patches, *, max_chunk_bytes=1, validate_unique_indices=True):
        original = torch.Tensor.copy_

        def copy_non_nan(destination, source, non_blocking=False):
            return original(destination, torch.where(source.isnan(), destination, source))

        whole = []
        for patch in patches:
            assert patch.indices.dtype in (torch.int32, torch.int64)
            assert patch.values.dtype == patch.dtype
            flat = torch.full((math.prod(patch.shape),), float("nan"), dtype=patch.dtype)
            flat[patch.indices.long()] = patch.values
            whole.append((patch.name, flat.view(patch.shape)))
        torch.Tensor.copy_ = copy_non_nan
        try:
            return set(model.load_weights(whole))
        finally:
            torch.Tensor.copy_ = original

    module.load_checkpoint_weight_patches = load_checkpoint_weight_patches
    return module


class WeightTransferEngine:
    """The stand-in's base class: what vLLM's does, as far as a subclass sees it."""

    def __init__(self, config, vllm_config, device, model) -> None:
        self.config, self.vllm_config, self.device, self.model = config, vllm_config, device, model
        self.model_config = vllm_config.model_config

    def parse_init_info(self, init_dict):
        return self.init_info_cls(**init_dict)

    def update_weights(self, update_info) -> None:
        self.receive_weights(self.update_info_cls(**update_info))


class WeightTransferEngineFactory:
    _registry: dict = {}  # noqa: RUF012 (vLLM's)

    @classmethod
    def register_engine(cls, name, module_path_or_cls, class_name=None) -> None:
        assert name not in cls._registry
        module = lambda: __import__(module_path_or_cls, fromlist=[class_name])  # noqa: E731
        cls._registry[name] = lambda: getattr(module(), class_name)

    @classmethod
    def create_engine(cls, config, vllm_config, device, model):
        return cls._registry[config.backend]()(config, vllm_config, device, model)


def install(monkeypatch: pytest.MonkeyPatch, patches: ModuleType) -> None:
    """Put the stand-in where `import vllm...` finds it."""
    base, factory = ModuleType("base"), ModuleType("factory")
    base.WeightTransferEngine = WeightTransferEngine
    base.WeightTransferInitInfo = base.WeightTransferUpdateInfo = type("Info", (), {})
    factory.WeightTransferEngineFactory = WeightTransferEngineFactory
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", {})
    names = {
        "vllm": ModuleType("vllm"),
        "vllm.distributed": ModuleType("distributed"),
        "vllm.distributed.weight_transfer": ModuleType("weight_transfer"),
        "vllm.distributed.weight_transfer.base": base,
        "vllm.distributed.weight_transfer.factory": factory,
        "vllm.model_executor": ModuleType("model_executor"),
        "vllm.model_executor.model_loader": ModuleType("model_loader"),
        "vllm.model_executor.model_loader.checkpoint_weight_patch": patches,
    }
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "neuroada.sync.vllm_engine", raising=False)
