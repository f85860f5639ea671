"""Experts' connections on files: the tensors that hold a fused parameter, and how each of them is edited.

A checkpoint holds a matrix [out, in] for each expert (`fused_experts`), whose entries are edited like any weight's, or
the parameter itself, [experts, out, in] or, as the model's class says, [experts, in, out].
"""

from functools import lru_cache
from typing import Any

import torch

from neuroada.errors import UserError
from neuroada.hf.fused_experts import expert_matrices
from neuroada.hf.loading import build_empty
from neuroada.hf.tensor_files import Checkpoint
from neuroada.offline.entries import Entries, ExpertEntries


def expert_edits(
    module: str, idx: torch.Tensor, delta: torch.Tensor, source: Checkpoint, told: str
) -> dict[str, Entries | ExpertEntries]:
    """Tensor in the checkpoint, without .weight -> its edit, in the order of the parameter's neurons.

    module: the parameter's name in the model; idx [experts, out, 2k] uint8, delta [experts, out, k]. UserError: the
    files hold no such parameter, or one of another shape.
    """
    names = expert_matrices(module, source.file_of)
    if names is None:
        return {module: ExpertEntries(idx, delta=delta, transposed=_is_transposed(module, source, told))}
    edits: dict[str, Entries | ExpertEntries] = {}
    for expert in range(len(idx)):
        first = 0
        for name in (name.format(expert) for name in names):
            if name not in source.tensors:
                raise UserError(f"{told}: no tensor {name} there; give the adapter's own base as --base-model")
            here = slice(first, first + source.tensors[name].shape[0])
            edits[name.removesuffix(".weight")] = Entries(idx[expert, here], delta=delta[expert, here])
            first = here.stop
        if first != idx.shape[1]:
            raise UserError(f"{told}: {module} has {first} rows an expert there, the adapter's has {idx.shape[1]} rows")
    return edits


def _is_transposed(module: str, source: Checkpoint, told: str) -> bool:
    """What the model's class says of its experts; nothing is concluded from shapes."""
    try:
        return bool(_model(str(source.folder)).get_submodule(module.rpartition(".")[0]).is_transposed)
    except AttributeError:
        raise UserError(f"{told}: no experts {module} there; give the adapter's own base as --base-model") from None


@lru_cache(maxsize=1)
def _model(folder: str) -> Any:
    """The model's modules, without values."""
    from transformers import AutoModelForCausalLM

    return build_empty(AutoModelForCausalLM, folder, torch.bfloat16, "eager")
