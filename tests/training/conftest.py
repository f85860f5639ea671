from pathlib import Path

import pytest
from distributed_runs import TinyRuns

from neuroada.sources.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama's folder."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(tiny, tmp_path_factory.mktemp("tiny_runs"))
