"""Mistakes that every source can be asked to make."""

import difflib
from collections.abc import Iterable

from neuroada.errors import UserError


class NotInSource(UserError):
    """The folder given as the source does not hold this file, which is named relative to it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for `name`, with the nearest known names, or all of them where none is near. `kind`: "model", ..."""
    known = list(known)
    folded = {entry.lower(): entry for entry in known}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    if near:
        return UserError(f"unknown {kind} {name!r}: did you mean {' or '.join(near)}?")
    return UserError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")
