"""One kernel for all ranks: pinned by the recipe, or by what rank 0 finds faster."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neuroada.methods import kernel

sampled_gradient = importlib.import_module("neuroada.ops.sampled_gradient")  # the package exports its function

GPU: Any = SimpleNamespace(type="cuda")


@pytest.fixture(autouse=True)
def unpinned():
    yield
    sampled_gradient.pin_gpu_backend(None)


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randn(6, 5), torch.randint(5, (4, 2))


def test_a_pinned_kernel_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_gradient, "fastest", lambda *args: pytest.fail("timed"))
    assert kernel.pin_kernel("dense", [], 8, torch.float32, GPU) == "dense"
    torch.testing.assert_close(sampled_gradient._on_gpu(*case()), sampled_gradient.reference(*case()))


def test_rank_0_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 times nothing, and takes what rank 0 sends."""
    monkeypatch.setattr(kernel, "_time", lambda *args: pytest.fail("rank 1 timed"))
    monkeypatch.setattr(kernel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(kernel.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(kernel.dist, "broadcast_object_list", lambda chosen: chosen.__setitem__(0, "dense"))
    assert kernel.pin_kernel("auto", [], 8, torch.float32, GPU) == "dense"


def test_a_cpu_has_nothing_to_choose() -> None:
    assert kernel.pin_kernel("triton", [], 8, torch.float32, torch.device("cpu")) == "cpu"
