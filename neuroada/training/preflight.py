"""Before the first step: every rank runs the same thing from the same things, and the run's folder can hold it.

Of a hundred ranks, one on a node with an old environment or another copy of the data trains something else without a
word. Here it stops the job with one line that names the node.
"""

import hashlib
import math
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import neuroada
from neuroada import sharding
from neuroada.errors import UserError, node_name
from neuroada.training.attention import describe_attention
from neuroada.training.engines import STATE, Engine, base_numel, trained
from neuroada.training.recipe import Recipe

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "safetensors")
REMEDIES = {
    "recipe": "start every node with the same recipe and overrides",
    "code": "let every node use the same checkout",
    "data": "let data_dir hold the same files on every node",
    "checkpoints": "let output_dir be one folder that all nodes share",
    "library": "let every node use the same environment",
}
ALONE_SECONDS = 20.0  # then a rank tells its mistake, if the others have not come to hear it
SHARED_SECONDS = 30.0  # a network file system may show a new file to other nodes only after a while


def gather(engine: Engine, value: Any) -> list[Any]:
    """`value` of every rank, by rank. Collective."""
    if engine.world_size == 1:
        return [value]
    values: list[Any] = [None] * engine.world_size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(engine: Engine) -> Iterator[None]:
    """A UserError in any rank's block ends all ranks with the same line, which names the node if not all met it."""
    mistake: str | None = None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    # Ranks that met no mistake may wait inside the block for this one, for as long as the watchdog lets them.
    alone = threading.Timer(ALONE_SECONDS, _tell, (engine.rank, mistake))
    alone.daemon = True
    if mistake is not None:
        alone.start()
    found = gather(engine, (node_name(), mistake))
    alone.cancel()
    mistakes = [(node, text) for node, text in found if text is not None]
    if mistakes:
        node, text = mistakes[0]
        raise UserError(text if len(mistakes) == len(found) else f"node {node}: {text}")


def _tell(rank: int, mistake: str) -> None:
    print(f"error: node {node_name()} (rank {rank}): {mistake}", file=sys.stderr, flush=True)


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
    facts |= {("library", name): _version(name) for name in LIBRARIES}
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


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def code_version() -> str:
    """The package's version, and a digest of its sources: finds an edited checkout, and needs no git."""
    root = Path(neuroada.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for suffix in ("py", "cpp", "json") for path in root.rglob(f"*.{suffix}")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{_version('neuroada')}+{digest.hexdigest()[:10]}"


def _check_folder(engine: Engine, folder: Path, nodes: list[str]) -> None:
    """Rank 0 writes a token into the run's folder, every rank reads it there."""
    token_file = folder / ".preflight"
    token, problem = secrets.token_hex(8), None
    if engine.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token_file.write_text(token)
        except OSError as error:
            problem = f"cannot be written from node {nodes[0]}: {error.strerror}; choose another"
    token, problem = gather(engine, (token, problem))[0]
    if problem is None:
        seen = gather(engine, _appears(token_file, token))
        if engine.rank == 0:
            token_file.unlink()
        if not all(seen):
            blind = nodes[seen.index(False)]
            problem = f"node {blind} does not see there what node {nodes[0]} writes; choose a folder all nodes share"
    if problem is not None:
        raise UserError(f"output_dir = {folder}: {problem}")


def _appears(path: Path, content: str) -> bool:
    end = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            if path.read_text() == content:
                return True
        except FileNotFoundError:
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
                    f"output_dir = {folder}: {_size(free)} free, but {coming} checkpoints of "
                    f"{_size(checkpoint_bytes(model))} are to be written; free some, or lower checkpoint.keep"
                )


def checkpoint_bytes(model: nn.Module) -> int:
    """Of one checkpoint: value and moments of every trained parameter, fp32."""
    return (1 + len(STATE)) * 4 * sum(math.prod(sharding.shape(param)) for _, param in trained(model))


def describe(recipe: Recipe, engine: Engine, model: nn.Module, data: object, steps: int, first: int) -> None:
    """Print one block a human can read, on rank 0. Collective."""
    mine = sum(sharding.stored(param).nbytes for param in model.parameters())
    found = gather(engine, (node_name(), mine))
    if engine.rank != 0:
        return
    nodes = list(dict.fromkeys(node for node, _ in found))
    trainable = sum(math.prod(sharding.shape(param)) for _, param in trained(model))
    total = base_numel(model)
    name = type(engine).__name__.removesuffix("Engine").lower()
    strategy = f"{name} {recipe.engine.ds_config}" if name == "deepspeed" else name
    selected = f", k = {recipe.adapter.k} by {recipe.adapter.selection}" if recipe.adapter.method == "neuroada" else ""
    free = shutil.disk_usage(recipe.output_dir).free
    print(
        f"world       {engine.world_size} rank(s), {engine.device.type}, on {len(nodes)} node(s): "
        f"{', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''}\n"
        f"strategy    {strategy}\n"
        f"model       {recipe.model}, {recipe.train.dtype}, {recipe.adapter.method}{selected}\n"
        f"attention   {describe_attention(recipe, engine.device)}\n"
        f"trainable   {trainable:,} of {total:,} ({100 * trainable / total:.4f} %)\n"
        f"memory      {_size(max(size for _, size in found))} of parameters on the fullest rank; gradients, AdamW's "
        f"moments and activations come on top\n"
        f"data        {recipe.task}: {data}\n"
        f"steps       {first} of {steps} done; {recipe.train.global_batch_size} sequences each\n"
        f"checkpoints every {recipe.checkpoint.every_steps} steps, {_size(checkpoint_bytes(model))} each, "
        f"{_size(free)} free\n"
        f"code        neuroada {code_version()}, torch {_version('torch')}",
        flush=True,
    )


def describe_time(seconds: float, steps: int) -> None:
    """Print the block's last line, once a step has been timed: `steps` are left, the last took `seconds`."""
    left = timedelta(seconds=math.ceil(seconds * steps))
    print(f"time        about {left} (hours:minutes:seconds) for the {steps} steps left", flush=True)


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
