"""Every block of docs/integrations.md runs."""

import re
from pathlib import Path

import pytest
from test_trl import PAIRS, TEXTS


def test_the_page_runs(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    names = {"BASE": str(tiny), "OUT": tmp_path, "DATA": TEXTS, "PAIRS": PAIRS}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert (tmp_path / "shira" / "adapter_model.safetensors").exists()
