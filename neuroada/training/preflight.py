"""Before the first step: every rank runs the same thing from the same things, and the run's folder can hold it.

Of a hundred ranks, one on a node with an old environment or another copy of the data trains something else without a
word. Here it stops the job with one line that names the node.
"""

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.engines import Engine
from neuroada.engines.collectives import gather, together
from neuroada.errors import UserError, node_name
from neuroada.files import read_text, write_text
from neuroada.runs.formatting import format_bytes
from neuroada.runs.metadata import code_version, library_version
from neuroada.training.checkpoint import checkpoint_bytes

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "safetensors")
REMEDIES = {
    "recipe": "start every node with the same recipe and overrides",
    "code": "let every node use the same checkout",
    "data": "let data_dir hold the same files on every node",
    "checkpoints": "let output_dir be one folder that all nodes share",
    "library": "let every node use the same environment",
}
SHARED_SECONDS = 30.0  # a network file system may show a new file to other nodes only after a while


def check_ranks(engine: Engine, recipe: Recipe, data: str) -> None:
    """All ranks agree on recipe, code, data fingerprint, checkpoints and libraries, and share output_dir. Collective.

    Raises:
        UserError: on every rank alike, naming the node and the field.
    """
    found = gather(engine, (node_name(), _facts(recipe, data)))
    first_node, first = found[0]
    for rank, (node, facts) in enumerate(found):
        for (kind, field), expected in first.items():
            value = facts.get((kind, field), "missing")
            if value != expected:
                raise UserError(
                    f"node {node} (rank {rank}): {field} is {value}, but {expected} on node {first_node} (rank 0); "
                    f"{REMEDIES[kind]}"
                )
    _check_folder(engine, Path(recipe.output_dir), [node for node, _ in found])


def _facts(recipe: Recipe, data: str) -> dict[tuple[str, str], str]:
    """What must be the same everywhere: (kind, field) -> value."""
    facts = {("code", "neuroada"): code_version()}
    facts |= {("library", name): library_version(name) for name in LIBRARIES}
    facts |= {("recipe", field): value for field, value in _flat(recipe.model_dump())}
    facts["data", "the data's fingerprint"] = data[:16]
    facts["checkpoints", "the newest checkpoint"] = _checkpoints(recipe)[-1] if _checkpoints(recipe) else "none"
    return facts


def _checkpoints(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in (Path(recipe.output_dir) / "checkpoints").glob("step-*"))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, repr(value)


def _check_folder(engine: Engine, folder: Path, nodes: list[str]) -> None:
    """Rank 0 writes a token into the run's folder, every rank reads it there; and what is in it takes files too."""
    token_file = folder / ".preflight"
    token, problem = secrets.token_hex(8), None
    if engine.rank == 0:
        try:
            write_text(token_file, token)
            _check_parts(folder)
        except UserError as error:
            problem = f"cannot be written from node {nodes[0]} ({error}); choose another"
    token, problem = gather(engine, (token, problem))[0]
    if problem is None:
        seen = gather(engine, _appears(token_file, token))
        if engine.rank == 0:
            token_file.unlink(missing_ok=True)
        if not all(seen):
            blind = nodes[seen.index(False)]
            problem = f"node {blind} does not see there what node {nodes[0]} writes; choose a folder all nodes share"
    if problem is not None:
        raise UserError(f"output_dir = {folder}: {problem}")


def _check_parts(folder: Path) -> None:
    """UserError where an earlier start left a part of the run's folder that cannot be written to, hours from now."""
    for name in ("checkpoints", "adapter", "model", "predictions", "tensorboard"):
        if os.path.lexists(folder / name):
            probe = folder / name / ".preflight"
            write_text(probe, "")
            probe.unlink(missing_ok=True)


def _appears(path: Path, content: str) -> bool:
    end = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            if read_text(path) == content:
                return True
        except UserError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def check_space(engine: Engine, recipe: Recipe, model: nn.Module) -> None:
    """There is room for `checkpoint.keep` checkpoints and one being written. Collective; UserError on every rank."""
    with together(engine):
        if engine.rank == 0:
            folder = Path(recipe.output_dir)
            coming = recipe.checkpoint.keep + 1 - min(recipe.checkpoint.keep, len(_checkpoints(recipe)))
            needed, free = coming * checkpoint_bytes(model), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"output_dir = {folder}: {format_bytes(free)} free, but {coming} checkpoints of "
                    f"{format_bytes(checkpoint_bytes(model))} are to be written; free some, or lower checkpoint.keep"
                )
