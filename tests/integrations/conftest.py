"""A tiny base on disk, with a tokenizer."""

from pathlib import Path

import pytest

from neuroada.sources.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("integrations") / "tiny")
