"""Portable checkpoints: safetensors and JSON, independent of engine and world size.

    checkpoints/step-000200/
      state.safetensors    value, exp_avg and exp_avg_sq of every trainable parameter, full, fp32 (of bf16: exact)
      progress.json        step, what the run trains, and on which weights
      recipe.yaml          the resolved recipe
      manifest.json        size and SHA-256 of the others, written last

A folder is written under a temporary name, synced and renamed, so that one with the final name is whole; the manifest
finds later damage. Of randomness nothing needs saving: sample order and seeds are functions of the recipe's seed and
the step. No frozen weight is inside, and no pickle is read.
"""

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from neuroada import sharding
from neuroada.config.recipe import LENGTH, Recipe, read_recipe
from neuroada.engines import STATE, Engine, trainable_parameters
from neuroada.errors import UserError
from neuroada.files import (
    check_schema,
    new_folder,
    open_regular,
    open_tensors,
    read_header,
    read_json,
    save_tensors,
    write_json,
)

STATE_FILE, PROGRESS_FILE, RECIPE_FILE, MANIFEST_FILE = (
    "state.safetensors",
    "progress.json",
    "recipe.yaml",
    "manifest.json",
)
REMOVE = "remove that checkpoint and run the same command again"


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
        except UserError as error:  # a full disk, mostly
            problem = str(error)
    failed = engine.reduce(torch.tensor([float(bool(problem))], device=engine.device))
    if failed.item():  # and nobody goes on before the checkpoint is whole
        raise UserError(
            f"output_dir = {recipe.output_dir}: the checkpoint of step {step} could not be written ({problem}); "
            f"then run the same command again: it goes on from {find_checkpoint(root.parent) or 'the start'}"
        )
    for old in _numbered(root)[: -recipe.checkpoint.keep] if engine.rank == 0 else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(final: Path, tensors: dict[str, torch.Tensor], progress: dict[str, Any], recipe: Recipe) -> None:
    """Write one checkpoint's folder; on an error nothing of it stays."""
    with new_folder(final, replace=True) as folder:  # replaces one of this step that was found damaged
        save_tensors(folder / STATE_FILE, tensors)
        write_json(folder / PROGRESS_FILE, progress)
        recipe.save(folder / RECIPE_FILE)
        files = {name: _describe(folder / name) for name in (STATE_FILE, PROGRESS_FILE, RECIPE_FILE)}
        write_json(folder / MANIFEST_FILE, files)


def check_unused(recipe: Recipe) -> None:
    """Refuse a folder that holds another run, or to start anew where checkpoints are: they would outnumber the new."""
    root = Path(recipe.output_dir) / "checkpoints"
    saved = Path(recipe.output_dir) / "recipe.yaml"
    there = read_recipe(saved).identity() if saved.exists() else {}
    for field, mine in recipe.identity().items():
        if there and there.get(field) != mine:
            why = ""
            if field.removeprefix("train.") in LENGTH:
                why = "its learning rates depend on that (a run of constant ones, without warm-up, is extended); "
            raise UserError(
                f"output_dir = {recipe.output_dir}: holds another run: {field} is {there.get(field)!r} there and "
                f"{mine!r} in this run; {why}choose another output_dir, or remove that run"
            )
    if recipe.checkpoint.resume == "never" and _numbered(root):
        raise UserError(
            f"checkpoint.resume = never: {root} already holds checkpoints; choose another output_dir, remove them, or "
            f"set checkpoint.resume=auto to go on"
        )


def check_unscored(output_dir: Path) -> None:
    """Refuse to start anew where a run was scored: a report would show its accuracy as the new run's. UserError."""
    scores = output_dir / "results.json"
    if scores.exists():
        raise UserError(
            f"output_dir = {output_dir}: holds the scores of an earlier run ({scores}) and no whole checkpoint to "
            f"go on from; choose another output_dir, or remove that run"
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
    folder: Path, engine: Engine, model: nn.Module, identity: dict[str, Any], backward_once: Callable[[int], object]
) -> int:
    """Put the checkpoint's state into the engine; returns its step. Collective; each rank reads what it needs.

    Raises:
        UserError: it was saved by a run that trains something else: the difference is named.
    """
    progress = _progress(folder)
    for field, mine in identity.items():
        older = {"weights": mine, "adapter.delta_dtype": "fp32"}  # what checkpoints of an earlier version lack
        if progress.get(field, older.get(field)) != mine:
            raise UserError(
                f"checkpoint {folder}: {field} is {progress.get(field)!r} there and {mine!r} in this run; "
                f"go on with the recipe beside it, or choose another output_dir"
            )
    stored = {tensor.name for tensor in read_header(folder / STATE_FILE, REMOVE)[0]}
    needed = {f"{key}/{name}" for name, _ in trainable_parameters(model) for key in ("value", *STATE)}
    if stored != needed:
        odd = min(stored ^ needed)
        raise UserError(
            f"checkpoint {folder}: {'lacks' if odd in needed else 'holds'} {odd}, unlike this run; {REMOVE}"
        )
    with open_tensors(folder / STATE_FILE, REMOVE) as file:

        def read(name: str, param: nn.Parameter) -> dict[str, torch.Tensor]:
            saved = {key: file.get_tensor(f"{key}/{name}") for key in ("value", *STATE)}
            for key, value in saved.items():
                if value.shape != sharding.shape(param) or value.dtype != torch.float32:
                    raise UserError(f"checkpoint {folder}: {key}/{name} is {list(value.shape)} {value.dtype}; {REMOVE}")
                if not bool(torch.isfinite(value).all()):
                    raise UserError(f"checkpoint {folder}: {key}/{name} holds NaN or infinity; {REMOVE}")
            return saved

        engine.restore(progress["step"], read, lambda: backward_once(progress["step"]))
    return progress["step"]


class Progress(BaseModel):
    """progress.json; its other fields are the run's identity."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: Annotated[int, Field(ge=0, le=1 << 40)]


def _progress(folder: Path) -> dict[str, Any]:
    path = folder / PROGRESS_FILE
    progress = check_schema(Progress, read_json(path, remedy=REMOVE), str(path), REMOVE)
    if progress.step != int(folder.name.removeprefix("step-")):
        raise UserError(f"{path}: step is {progress.step}, in the folder {folder.name}; {REMOVE}")
    return progress.model_dump()


def checkpoint_bytes(model: nn.Module) -> int:
    """Of one checkpoint: value and moments of every trainable parameter, fp32."""
    sizes = (sharding.shape(param).numel() for _, param in trainable_parameters(model))
    return (1 + len(STATE)) * torch.float32.itemsize * sum(sizes)


def _numbered(root: Path) -> list[Path]:
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _describe(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _damage(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted, or None."""
    try:
        files = read_json(folder / MANIFEST_FILE, limit=1 << 16)
    except UserError:
        return f"{MANIFEST_FILE} is missing or damaged"
    for name in (STATE_FILE, PROGRESS_FILE, RECIPE_FILE):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if not isinstance(files, dict) or _describe(folder / name) != files.get(name):
            return f"{name} has been cut or changed"
    return None
