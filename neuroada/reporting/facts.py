"""run.json: what a run's other files do not tell - its size and its environment. No host name and no path."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def write_facts(
    folder: Path, *, trainable: int, parameters: int, steps: int, strategy: str, world_size: int, code: str
) -> None:
    """Write `folder`/run.json when a run starts. `trainable` of all `parameters` can change."""
    facts = {
        "trainable": trainable,
        "parameters": parameters,
        "steps": steps,
        "strategy": strategy,
        "world_size": world_size,
        "code": code,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
    }
    partial = folder / ".run.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(folder / "run.json")


def device_name() -> str:
    """The kind of device a rank computes on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
