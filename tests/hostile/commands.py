"""The commands under attack, as `neuroada COMMAND` runs them."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from neuroada.cli import submit
from neuroada.cli.main import script


def command(name: str) -> Callable[[], None]:
    return _submit if name == "submit" else lambda: script(name)


def _submit() -> None:
    """In a world that stands for the repository, with its programs for SLURM's."""
    here = Path.cwd()
    path = f"{here / 'bin'}:{os.environ['PATH']}"
    with patch.object(submit, "REPOSITORY", here), patch.dict(os.environ, {"PATH": path}):
        script("submit")
