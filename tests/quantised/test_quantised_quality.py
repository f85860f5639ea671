"""benchmarks/quantised_quality.py: every entry runs, learns as many parameters, and is not run twice."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.sources.tiny import make_tiny


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("quantised_quality")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    model = make_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"{i} + {i} =", "completion": f"{2 * i}"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--out", str(tmp_path / "out"), "--dataset", f"{{path: {tmp_path / 'data.jsonl'}}}", "--model", str(model),
            "--steps", "2", "--k", "4", "--validation", "4", "--seeds", "1"]  # fmt: skip


def test_every_entry_is_trained_once(benchmark, arguments, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    entries = list(benchmark.BASES)
    if importlib.util.find_spec("bitsandbytes") is not None:
        entries.append("qlora")
    benchmark.main([*arguments, "--entries", *entries, "--qlora-lrs", "1e-3"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [result["entry"] for result in results] == entries
    by_entry = {result["entry"]: result for result in results}
    assert by_entry["unquantised"]["bytes"] > by_entry["int8"]["bytes"] > by_entry["nf4"]["bytes"]
    assert by_entry["nf4"]["bytes"] > by_entry["nf4-plain"]["bytes"]
    for name, result in by_entry.items():
        assert result["before"] == pytest.approx(by_entry["unquantised"]["before"], rel=0.05), name
        assert result["after"] != result["before"]
        assert result["trainable"] == pytest.approx(
            by_entry["unquantised"]["trainable"], rel=0.25 if name == "qlora" else 0
        )
    table = capsys.readouterr().out
    assert all(f"\n| {entry} | " in table for entry in entries)

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("validation.json")}
    benchmark.main([*arguments, "--entries", "nf4", "int8"])
    assert all(path.stat().st_mtime_ns == then for path, then in files.items())
    with pytest.raises(UserError, match="holds a run of other fields than are asked for"):
        benchmark.main([*arguments, "--entries", "nf4", "--override", "train.global_batch_size=2"])


def test_qlora_without_bitsandbytes_is_told_in_a_line(benchmark, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--entries qlora: bitsandbytes is not installed; pip install"):
        benchmark.main(arguments)
