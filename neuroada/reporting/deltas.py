"""How far each weight moved, from the files of what was trained: norms only, one weight in memory at a time."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

PREFIX = "base_model.model."


def moved(folder: Path, base: Path | None) -> list[dict[str, Any]]:
    """One entry a trained weight: {"layer", "projection", "rms", "relative"}, in the model's order.

    folder: a run's folder, with adapter/ in it or model/ (which needs `base`, the base model's folder).
    rms: root mean square of the change, over the entries that train (LoRA: over all).
    relative: Frobenius norm of the change over that of the base weight; None without `base`.
    """
    found = []
    for name, squared, entries in (
        _adapter(folder / "adapter") if (folder / "adapter").is_dir() else _model(folder, base)
    ):
        place = re.search(r"\.(\d+)\.", name)
        norm = _norm(base, name) if base is not None else None
        found.append(
            {
                "layer": int(place[1]) if place else 0,
                "projection": name.split(".")[-1] if place is None else name[place.end(1) + 1 :],
                "rms": math.sqrt(squared / max(entries, 1)),
                "relative": math.sqrt(squared) / norm if norm else None,
            }
        )
    return sorted(found, key=lambda entry: entry["layer"])


def _adapter(folder: Path) -> Iterator[tuple[str, float, int]]:
    """(module, sum of squares of the change, entries that train) for each module of a PEFT adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name = key.removeprefix(PREFIX)
            for suffix in (".neuroada_delta", ".shira_weight", ".supertuning_values"):
                if name.endswith(suffix):
                    values = file.get_tensor(key).float()
                    yield name.removesuffix(suffix), float(values.square().sum()), values.numel()
            if name.endswith(".lora_A.weight"):
                a = file.get_tensor(key).float()
                b = file.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
                scale = config["lora_alpha"] / config["r"]
                # |BA|^2 = trace(B'B AA'), without the product
                squared = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
                yield name.removesuffix(".lora_A.weight"), squared, len(b) * a.shape[1]


def _model(folder: Path, base: Path | None) -> Iterator[tuple[str, float, int]]:
    """The same of whole weights, against the base model's: the entries that changed are those that train."""
    after, before = _files(folder / "model"), _files(base) if base is not None else {}
    for name, file in after.items():
        if name not in before or not re.search(
            r"\.\d+\..*proj\.weight$|\.\d+\..*(query|key|value|dense)\.weight$", name
        ):
            continue
        change = _read(file, name) - _read(before[name], name)
        yield name.removesuffix(".weight"), float(change.square().sum()), int(change.count_nonzero())


def _norm(base: Path, module: str) -> float | None:
    """Frobenius norm of a base weight."""
    name = f"{module}.weight"
    file = _files(base).get(name)
    return float(_read(file, name).norm()) if file is not None else None


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name).float()
