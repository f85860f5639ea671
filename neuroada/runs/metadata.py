"""run.json: what a run's other files do not tell, its size and its environment. No host name and no path."""

import hashlib
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

import neuroada
from neuroada.files import check_schema, read_json, write_json

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
NOT_INSTALLED = "not installed"


class Metadata(BaseModel):
    """run.json. Runs from before a field was written lack it."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: str = ""
    loss_unit: str = ""
    trainable: Annotated[int, Field(ge=0)]
    parameters: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=0)]
    strategy: str
    world_size: Annotated[int, Field(ge=1)]
    code: str
    started: str
    device: str
    python: str
    platform: str
    libraries: dict[str, str]


def read_metadata(path: Path) -> dict[str, Any]:
    """run.json's content. UserError: not what `write_metadata` wrote."""
    return check_schema(Metadata, read_json(path), str(path)).model_dump(exclude_unset=True)


def write_metadata(
    folder: Path,
    *,
    method: str,
    objective: str,
    loss_unit: str,
    trainable: int,
    parameters: int,
    steps: int,
    strategy: str,
    world_size: int,
) -> None:
    """Write `folder`/run.json when a run starts. `trainable` of all `parameters` can change; `method` and `objective`
    in words."""
    write_json(
        folder / "run.json",
        {
            "method": method,
            "objective": objective,
            "loss_unit": loss_unit,
            "trainable": trainable,
            "parameters": parameters,
            "steps": steps,
            "strategy": strategy,
            "world_size": world_size,
            "code": code_version(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device_name(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "libraries": {name: found for name in LIBRARIES if (found := library_version(name)) != NOT_INSTALLED},
        },
    )


def device_name() -> str:
    """The kind of device a rank computes on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def library_version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return NOT_INSTALLED


def code_version() -> str:
    """The package's version, and a digest of its sources: finds an edited checkout, and needs no git."""
    root = Path(neuroada.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for suffix in ("py", "cpp", "json") for path in root.rglob(f"*.{suffix}")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{neuroada.__version__}+{digest.hexdigest()[:10]}"
