"""An adapter's folder, read strictly: what is missing, renamed, changed or not finite is refused, never made up.

PEFT itself loads what it finds: a tensor whose name it does not know is left out, and one that it misses keeps the
value of a fresh adapter, a delta of 0.
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from neuroada.adapter.config import k_of
from neuroada.adapter.neurons import NeuronChoice
from neuroada.adapter.selection import Selection
from neuroada.errors import UserError
from neuroada.files import check_schema, load_tensors, read_json
from neuroada.ops import MAX_IN_FEATURES, unpack_indices

PREFIX = "base_model.model."  # PEFT's, of every key of an adapter's file
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
AGAIN = "save the adapter again"


class AdapterConfig(BaseModel):
    """What this project reads of adapter_config.json, of any of PEFT's methods; other fields are PEFT's own."""

    model_config = ConfigDict(strict=True)

    peft_type: Annotated[str, Field(min_length=1)]
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class NeuroAdaFields(AdapterConfig):
    """NeuroAda's own fields beside them."""

    peft_type: Literal["NEUROADA"]
    k: Annotated[int, Field(ge=1, le=MAX_IN_FEATURES)]
    k_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_IN_FEATURES)]] | None = None
    selection: Selection = "magnitude"
    neuron_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    neuron_choice: NeuronChoice = "random"
    seed: int = 0
    base_fingerprint: str | None = None
    connections_sha256: str | None = None


@dataclass
class AdapterFile:
    """A NeuroAda adapter's folder, by the names of the base model's modules and tensors."""

    folder: Path
    config: NeuroAdaFields
    connections: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Module -> idx [out, 2k] uint8, delta [out, k] fp32; of experts' parameters idx [experts, out, 2k] and so on."""
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensor -> value, of modules_to_save."""


def read_config(folder: Path) -> AdapterConfig:
    """adapter_config.json of any of PEFT's methods. UserError: missing, not JSON, fields of another kind."""
    path = folder / CONFIG_FILE
    content = read_json(path, remedy=AGAIN)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    return check_schema(NeuroAdaFields if kind == "NEUROADA" else AdapterConfig, content, str(path), AGAIN)


def read_adapter(folder: Path) -> AdapterFile:
    """A NeuroAda adapter, every tensor of its file checked.

    UserError: another method's; a module with idx or delta alone; shapes that are not [out, 2k] and [out, k] for the
    configuration's k; indices that repeat in a row; values that are not finite; dtypes other than uint8 and fp32; a
    module that target_modules does not name; tensors that differ from connections_sha256 (without it: a warning).
    """
    config = read_config(folder)
    if not isinstance(config, NeuroAdaFields):
        raise UserError(
            f"{folder / CONFIG_FILE}: peft_type is {config.peft_type}, not NEUROADA; give a NeuroAda adapter"
        )
    path = folder / TENSORS_FILE
    tensors, _ = load_tensors(path, AGAIN)
    found = AdapterFile(folder, config)
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise UserError(f"{path}: {key} does not begin with {PREFIX!r}; {AGAIN}")
        module, _, kind = name.rpartition(".")
        if kind == "neuroada_idx":
            delta = tensors.get(f"{PREFIX}{module}.neuroada_delta")
            check_pair(path, module, value, delta, k_of(module, config.k, config.k_pattern))
            assert delta is not None
            found.connections[module] = value, delta
        elif kind == "neuroada_delta":
            if f"{PREFIX}{module}.neuroada_idx" not in tensors:
                raise UserError(f"{path}: {module} has deltas and no indices; {AGAIN}")
        else:
            check_finite_values(path, name, value)
            found.whole[name] = value
    _check_modules(path, found)
    if config.connections_sha256 is None:
        warnings.warn(
            f"{path}: has no connections_sha256 in {CONFIG_FILE}: later changes are not noticed", stacklevel=2
        )
    elif connections_sha256(found.connections) != config.connections_sha256:
        raise UserError(
            f"{path}: indices or deltas are not those that were saved (connections_sha256 differs); {AGAIN}"
        )
    return found


def connections_sha256(connections: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Of every module's name, idx [out, 2k] uint8 and delta [out, k], in the order of names: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for module in sorted(connections):
        digest.update(f"{module}\n".encode())
        for tensor in connections[module]:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of(tensors: Mapping[str, torch.Tensor], adapter: str) -> str | None:
    """`connections_sha256` of what is about to be saved, under PEFT's names.

    None where the tensors are not all here (of ranks that do not write, say).
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"neuroada_idx": {}, "neuroada_delta": {}}
    for key, value in tensors.items():
        name = key.removesuffix(".weight").removesuffix(f".{adapter}").removeprefix(PREFIX)
        module, _, kind = name.rpartition(".")
        if kind in parts:
            parts[kind][module] = value
    idx, delta = parts.values()
    plain = all(type(value) in (torch.Tensor, torch.nn.Parameter) for part in (idx, delta) for value in part.values())
    whole = idx.keys() == delta.keys() and all(value.numel() and not value.is_meta for value in idx.values())
    pairs = {module: (idx[module], delta[module]) for module in idx} if plain and whole else {}
    return connections_sha256(pairs) if pairs else None


def check_finite(folder: Path) -> None:
    """UserError where a floating-point tensor of an adapter's file, of any method, is NaN or infinite."""
    path = folder / TENSORS_FILE
    for name, value in load_tensors(path, AGAIN)[0].items():
        check_finite_values(path, name, value)


def check_pair(path: Path | str, module: str, idx: torch.Tensor, delta: torch.Tensor | None, k: int) -> None:
    """A module's idx [*neurons, 2k] uint8 and delta [*neurons, k] fp32, finite, no connection twice. UserError."""
    if delta is None:
        raise UserError(f"{path}: {module} has indices and no deltas; {AGAIN}")
    if idx.dtype != torch.uint8 or idx.ndim not in (2, 3) or idx.shape[-1] != 2 * k or not idx.numel():
        raise UserError(f"{path}: {module} has indices {_kind(idx)}, expected [out, {2 * k}] uint8 (k = {k}); {AGAIN}")
    if delta.dtype != torch.float32 or delta.shape != (*idx.shape[:-1], k):
        expected = [*idx.shape[:-1], k]
        raise UserError(f"{path}: {module} has deltas {_kind(delta)}, expected {expected} float32; {AGAIN}")
    check_finite_values(path, f"{module}.neuroada_delta", delta)
    columns = unpack_indices(idx).sort(dim=-1).values
    if k > 1 and bool((columns[..., 1:] == columns[..., :-1]).any()):
        raise UserError(f"{path}: {module} has a connection twice in one row; {AGAIN}")


def check_finite_values(path: Path | str, name: str, value: torch.Tensor) -> None:
    """UserError where a floating-point tensor is NaN or infinite."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise UserError(f"{path}: {name} holds NaN or infinity: its training diverged, or the file is damaged; {AGAIN}")


def _check_modules(path: Path, found: AdapterFile) -> None:
    """Modules against the configuration, as far as that is possible without the model."""
    if not found.connections:
        raise UserError(f"{path}: holds no connections (neuroada_idx, neuroada_delta); {AGAIN}")
    targets = found.config.target_modules
    if not isinstance(targets, list):
        return
    named = [*(("target_modules", target) for target in targets),
             *(("target_parameters", target) for target in found.config.target_parameters or ())]  # fmt: skip
    for module in found.connections:
        if not any(f".{module}".endswith(f".{target}") for _, target in named):
            raise UserError(f"{path}: holds {module}, which target_modules in {CONFIG_FILE} does not name; {AGAIN}")
    for section, target in named:
        if not any(f".{module}".endswith(f".{target}") for module in found.connections):
            raise UserError(f"{path}: holds nothing for {section}' {target}; {AGAIN}")


def _kind(tensor: Any) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
