"""Experts' parameters that a model fuses and its checkpoint does not: transformers joins them as it loads, so do we.

Files hold a matrix [out, in] for each expert, `...experts.3.up_proj.weight`; the model [experts, out, in], with gate
and up one above the other.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from neuroada.errors import UserError
from neuroada.files import open_tensors

MATRICES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""A fused parameter -> the matrices it is made of, as Qwen-MoE and DeepSeek name them, and as Mixtral does."""


def name_in_files(name: str, files: Mapping[str, Path]) -> str:
    """`name` as the files spell it: Mixtral's call a block's `mlp` block_sparse_moe."""
    older = name.replace(".mlp.", ".block_sparse_moe.")
    return older if name not in files and older in files else name


def in_files(name: str, files: Mapping[str, Path]) -> bool:
    """Whether the files hold this parameter, under its own name, an older one, or expert by expert."""
    return name_in_files(name, files) in files or expert_matrices(name, files) is not None


def expert_matrices(name: str, files: Mapping[str, Path]) -> list[str] | None:
    """Names in the files, with {} for an expert's number, of the matrices that make this parameter; None: not fused."""
    module, _, fused = name.rpartition(".")
    for prefix in (module, module.replace(".mlp.", ".block_sparse_moe.")):
        for parts in MATRICES.get(fused, ()):
            names = [f"{prefix}.{{}}.{part}.weight" for part in parts]
            if all(part.format(0) in files for part in names):
                return names
    return None


def read_experts(names: list[str], experts: slice, files: Mapping[str, Path]) -> torch.Tensor:
    """The fused weights of these experts, [experts, out, in]. UserError where the files lack one of them."""

    def read(name: str) -> torch.Tensor:
        if name not in files:
            raise UserError(f"model: the checkpoint has no tensor {name}; its files do not match its config.json")
        with open_tensors(files[name]) as file:
            return file.get_tensor(name)

    numbers = range(experts.start, experts.stop)
    return torch.stack([torch.cat([read(name.format(number)) for name in names]) for number in numbers])
