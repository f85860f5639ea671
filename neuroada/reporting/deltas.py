"""How far each weight moved, from the files of what was trained: norms only, one weight in memory at a time."""

import math
import re
from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import StoredTensor, open_tensors, weight_files
from neuroada.methods.base import Method


def moved(method: type[Method], saved: Path, base: Path | None) -> list[dict[str, Any]]:
    """One entry for each weight that trained: {"layer", "projection", "rms", "relative"}, in the model's order.

    saved: the folder of what `method` trained; base: the base model's folder.
    rms: root mean square of the change, over the entries that train (LoRA: over all).
    relative: Frobenius norm of the change over that of the base weight; None without `base`.

    UserError: a change that is NaN or infinite.
    """
    weights = {} if base is None else weight_files(base)
    found = []
    for name, squared, entries in method.changes(saved, weights):
        if not math.isfinite(squared):
            raise UserError(f"{saved}: the change of {name} is not finite; train it again with a lower optimizer.lr")
        place = re.search(r"\.(\d+)\.", name)
        norm = _norm(weights.get(f"{name}.weight"))
        found.append(
            {
                "layer": int(place[1]) if place else 0,
                "projection": name.split(".")[-1] if place is None else name[place.end(1) + 1 :],
                "rms": math.sqrt(squared / max(entries, 1)),
                "relative": math.sqrt(squared) / norm if norm else None,
            }
        )
    return sorted(found, key=lambda entry: entry["layer"])


def _norm(stored: StoredTensor | None) -> float | None:
    """Frobenius norm of a base weight."""
    if stored is None:
        return None
    with open_tensors(stored.file) as opened:
        return float(opened.get_tensor(stored.name).float().norm())
