"""Numbers and names as a reader sees them."""

from pathlib import Path, PurePosixPath
from typing import Any


def format_bytes(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def short(source: str) -> str:
    """A model's hub id, or the last part of its folder: a report tells no path of the machine it was made on."""
    local = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
    return PurePosixPath(source).name if local else source


def without_paths(values: Any) -> Any:
    """`values` with every absolute path cut to its last part."""
    if isinstance(values, dict):
        return {key: without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_paths(value) for value in values]
    return PurePosixPath(values).name if isinstance(values, str) and values.startswith(("/", "~")) else values
