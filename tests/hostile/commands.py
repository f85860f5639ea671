"""The commands under attack, as `neuroada COMMAND` runs them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from neuroada.cli import submit
from neuroada.cli.main import script
from neuroada.sources import llm_adapters


def command(name: str) -> Callable[[], None]:
    own = {"submit": _submit, "fetch": _fetch}
    return own.get(name, lambda: script(name))


def _submit() -> None:
    """In a world that stands for the repository, with its programs for SLURM's."""
    here = Path.cwd()
    path = f"{here / 'bin'}:{os.environ['PATH']}"
    with patch.object(submit, "REPOSITORY", here), patch.dict(os.environ, {"PATH": path}):
        script("submit")


def _fetch() -> None:
    """From a server of this machine in place of GitHub, where the world says so (served.json: url, sets)."""
    served = json.loads(Path("served.json").read_text()) if Path("served.json").exists() else {"sets": {}}
    url = served.get("url", llm_adapters.RAW_URL)
    with patch.object(llm_adapters, "RAW_URL", url), patch.dict(llm_adapters.SETS, served["sets"]):
        script("fetch")
