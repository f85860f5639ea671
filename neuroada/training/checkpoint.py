"""Portable checkpoints: safetensors and JSON, independent of engine and world size.

    checkpoints/step-000200/
      state.safetensors    value, exp_avg and exp_avg_sq of every trainable parameter, full, fp32
      progress.json        step, what the run trains, and on which weights
      recipe.yaml          the resolved recipe
      manifest.json        size and SHA-256 of the others, written last

A folder is written under a temporary name, synced and renamed, so that one with the final name is whole; the manifest
finds later damage. Of randomness nothing needs saving: sample order and seeds are functions of the recipe's seed and
the step. No frozen weight is inside, and no pickle is read.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from neuroada import sharding
from neuroada.config.recipe import Recipe
from neuroada.engines import STATE, Engine, trainable_parameters
from neuroada.errors import UserError

STATE_FILE, PROGRESS_FILE, RECIPE_FILE, MANIFEST_FILE = (
    "state.safetensors",
    "progress.json",
    "recipe.yaml",
    "manifest.json",
)


def save_checkpoint(engine: Engine, model: nn.Module, recipe: Recipe, step: int, identity: dict[str, Any]) -> Path:
    """Write checkpoints/step-N of the run's folder, then drop all but the newest `checkpoint.keep`.

    Collective: one parameter is gathered at a time, rank 0 writes. `identity` is what a resuming run must share.
    """
    root = Path(recipe.output_dir) / "checkpoints"
    final = root / f"step-{step:06d}"
    tensors: dict[str, torch.Tensor] = {}
    for name, param in trainable_parameters(model):
        with sharding.whole(param) as value:
            state = {"value": value, **engine.moments(param)}
            if engine.rank == 0:
                for key, tensor in state.items():
                    tensors[f"{key}/{name}"] = tensor.detach().float().to("cpu", copy=True).contiguous()
    problem = ""
    if engine.rank == 0:
        try:
            _write(final, tensors, {"step": step, **identity}, recipe)
        except (OSError, SafetensorError) as error:  # a full disk, mostly
            problem = str(error)
    failed = engine.reduce(torch.tensor([float(bool(problem))], device=engine.device))
    if failed.item():  # and nobody goes on before the checkpoint is whole
        raise UserError(
            f"output_dir = {recipe.output_dir}: the checkpoint of step {step} could not be written: {problem}; "
            f"make room and run the same command again: it goes on from {find_checkpoint(root.parent) or 'the start'}"
        )
    for old in _numbered(root)[: -recipe.checkpoint.keep] if engine.rank == 0 else []:
        shutil.rmtree(old)
    return final


def _write(final: Path, tensors: dict[str, torch.Tensor], progress: dict[str, Any], recipe: Recipe) -> None:
    """Write one checkpoint's folder; on an error nothing of it stays."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / STATE_FILE)
        (partial / PROGRESS_FILE).write_text(json.dumps(progress, indent=1))
        recipe.save(partial / RECIPE_FILE)
        files = {name: _describe(partial / name) for name in (STATE_FILE, PROGRESS_FILE, RECIPE_FILE)}
        (partial / MANIFEST_FILE).write_text(json.dumps(files, indent=1))
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)  # one of this step that was found damaged
        partial.replace(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_unused(recipe: Recipe) -> None:
    """Refuse to start anew where another run's checkpoints stand: they would outnumber the new ones."""
    root = Path(recipe.output_dir) / "checkpoints"
    if recipe.checkpoint.resume == "never" and _numbered(root):
        raise UserError(
            f"checkpoint.resume = never: {root} already holds checkpoints; choose another output_dir, remove them, or "
            f"set checkpoint.resume=auto to go on"
        )


def find_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning that says which and why."""
    for folder in reversed(_numbered(output_dir / "checkpoints")):
        problem = _damage(folder)
        if problem is None:
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {problem}", stacklevel=2)
    return None


def restore_checkpoint(
    folder: Path, engine: Engine, identity: dict[str, Any], backward_once: Callable[[int], object]
) -> int:
    """Put the checkpoint's state into the engine; returns its step. Collective; each rank reads what it needs.

    Raises:
        UserError: it was saved by a run that trains something else: the difference is named.
    """
    progress = json.loads((folder / PROGRESS_FILE).read_text())
    for field, mine in identity.items():
        if progress.get(field) != mine:
            raise UserError(
                f"checkpoint {folder}: {field} is {progress.get(field)!r} there and {mine!r} in this run; "
                f"go on with the recipe beside it, or choose another output_dir"
            )
    with safe_open(folder / STATE_FILE, framework="pt") as file:

        def read(name: str, param: nn.Parameter) -> dict[str, torch.Tensor]:
            saved = {key: file.get_tensor(f"{key}/{name}") for key in ("value", *STATE)}
            if saved["value"].shape != sharding.shape(param):
                raise UserError(f"checkpoint {folder}: {name} has shape {tuple(saved['value'].shape)} there")
            return saved

        engine.restore(progress["step"], read, lambda: backward_once(progress["step"]))
    return progress["step"]


def checkpoint_bytes(model: nn.Module) -> int:
    """Of one checkpoint: value and moments of every trainable parameter, fp32."""
    sizes = (sharding.shape(param).numel() for _, param in trainable_parameters(model))
    return (1 + len(STATE)) * torch.float32.itemsize * sum(sizes)


def _numbered(root: Path) -> list[Path]:
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted, or None."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST_FILE} is missing or damaged"
    for name, described in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _describe(folder / name) != described:
            return f"{name} has been cut or changed"
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
