"""What the tests of several packages share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data files; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("NEUROADA_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set NEUROADA_TEST_DATA")
    return folder
