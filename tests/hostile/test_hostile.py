"""The fuzzer as a test: 300 attempts, and 3,000 in `make test-long`. docs/security.md holds its table."""

from pathlib import Path

import pytest
from fuzz import Fuzzer, schedule


def attempts(folder: Path, count: int, seed: int) -> list[str]:
    fuzzer = Fuzzer(folder / "fuzz", seed)
    return [wrong for number, name in enumerate(schedule(count)) if (wrong := fuzzer.attempt(number, name)[1])]


def test_300_attempts(tmp_path: Path) -> None:
    assert attempts(tmp_path, 300, seed=0) == []


@pytest.mark.long
def test_3000_attempts(tmp_path: Path) -> None:
    assert attempts(tmp_path, 3000, seed=1) == []
