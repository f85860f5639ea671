"""`neuroada doctor`: what it checks holds here, what it writes is its schema, and a check that breaks is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuroada.doctor import CHECKS, Check, Found, NotHere, Place, Report, examine, training
from neuroada.doctor.measured import PEAK_FLOPS

DOCS = Path(__file__).resolve().parents[1] / "docs" / "doctor.md"
COSTLY = {"engine-zero2", "engine-zero3"}  # tests/training holds every engine to one process' curve


@pytest.fixture(scope="module")
def doctor(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """(the command as it ended, its file)."""
    out = tmp_path_factory.mktemp("doctor") / "doctor.json"
    names = [check.name for check in CHECKS if check.name not in COSTLY]
    command = [sys.executable, "-m", "neuroada", "doctor", "--checks", *names, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True), out


def test_every_claim_that_can_be_checked_here_holds(doctor: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = doctor
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = Report.model_validate(json.loads(out.read_text()))
    assert [result.name for result in report.results] == [check.name for check in CHECKS if check.name not in COSTLY]
    for result in report.results:
        assert result.status in ("PASS", "NOT HERE"), result
        assert (result.value is not None) == (result.limit is not None) == (result.status == "PASS"), result
        assert result.detail
    passed = {result.name for result in report.results if result.status == "PASS"}
    if not torch.cuda.is_available():
        assert passed == {
            "kernel-gradient", "kernel-product", "packing-sdpa", "memory-plan-small", "memory-beside-small",
            "step-time-small", "engine-fsdp2",
        }  # fmt: skip


def test_the_table_shows_environment_and_checks(doctor: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = doctor
    report = Report.model_validate(json.loads(out.read_text()))
    assert {"torch", "transformers", "peft", "deepspeed", "accelerate", "datasets"} <= set(report.environment.libraries)
    assert report.environment.cpu_cores >= 1 and report.environment.memory_bytes > 1e8
    assert {tool.name for tool in report.environment.tools} >= {
        "C++ compiler", "sbatch", "flash_attn", "vllm", "bitsandbytes", "torchao",
    }  # fmt: skip
    for name in ("versions", "missing", *(result.name for result in report.results)):
        assert name in done.stdout
    assert not {str(Path.home()), str(out.parent)} & set(out.read_text().split('"'))


class Toy(Check):
    claim, number = "a claim", "a number"

    def __init__(self, name: str, value: float | Exception) -> None:
        self.name, self.value = name, value

    def run(self, place: Place) -> Found:
        if isinstance(self.value, Exception):
            raise self.value
        return Found(self.value, 1.0)


def test_a_check_that_breaks_costs_the_others_nothing(tmp_path: Path) -> None:
    toys = [
        Toy("holds", 1.0),
        Toy("fails", 1.5),
        Toy("nan", float("nan")),
        Toy("breaks", RuntimeError("no such\nfile: /home/somebody/models/tiny")),
        Toy("absent", NotHere("needs a GPU")),
        Toy("small card", torch.OutOfMemoryError("CUDA out of memory")),
        Toy("holds too", 0.0),
    ]
    told: list[str] = []
    report = examine(toys, Place(torch.device("cpu"), tmp_path), tmp_path / "doctor.json", told.append)
    assert told == [toy.name for toy in toys]
    statuses = {result.name: result.status for result in report.results}
    assert statuses == {
        "holds": "PASS", "fails": "FAIL", "nan": "FAIL", "breaks": "FAIL", "absent": "NOT HERE",
        "small card": "NOT HERE", "holds too": "PASS",
    }  # fmt: skip
    assert report.failed == ["fails", "nan", "breaks"]
    details = {result.name: result.detail for result in report.results}
    assert details["breaks"] == "RuntimeError: no such file: tiny"
    assert Report.model_validate(json.loads((tmp_path / "doctor.json").read_text())) == report


def test_an_unknown_check_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from neuroada.cli.doctor import main
    from neuroada.errors import UserError

    with pytest.raises(UserError, match="--checks kernels: no such check; checks: kernel-gradient, kernel-product"):
        main(["--checks", "kernels"])


def test_the_page_says_what_every_check_claims() -> None:
    page = DOCS.read_text()
    assert [check.name for check in CHECKS if f"`{check.name}`" not in page] == []
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize(
    ("name", "flops"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A10G", None), ("NVIDIA L40", None)],
)  # fmt: skip
def test_a_device_is_known_by_its_whole_name(name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuroada.doctor.measured import peak_flops

    assert flops is None or flops in PEAK_FLOPS.values()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == flops


RANKS_OF_A_FAILED_RUN = """\
W1128 torch/distributed/run.py: setting OMP_NUM_THREADS
[rank1]: Traceback (most recent call last):
[rank1]:     t = data.detach().requires_grad_(requires_grad)
[rank1]: RuntimeError: only Tensors of floating point dtype can require gradients
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""


@pytest.mark.parametrize(
    ("printed", "status", "told"),
    [
        (RANKS_OF_A_FAILED_RUN, 1, "RuntimeError: only Tensors of floating point dtype can require gradients$"),
        ("killed\n", 137, "^exit status 137: killed$"),
        ("error: step 3: the gradient norm is nan\nTraceback\n", 2, "^exit status 2: error: step 3: .* norm is nan$"),
    ],
)
def test_a_failed_launch_tells_what_its_ranks_said(
    printed: str, status: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], status, stdout="", stderr=printed)
    monkeypatch.setattr(training.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=told):
        training.launched(tmp_path / "recipe.yaml", 2)
