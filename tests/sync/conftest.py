"""Tiny trainers and receivers on one base."""

from pathlib import Path

import pytest

from neuroada.sources.tiny import make_tiny


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("sync") / "tiny", hidden=32)
