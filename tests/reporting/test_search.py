"""In which order a comparison makes its runs, and which learning rates it tries."""

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from neuroada.comparison.contenders import Comparison, read_contenders
from neuroada.comparison.search import WIDENED, beyond, search, visible_gpus
from neuroada.config.recipe import Recipe
from neuroada.errors import UserError


class Runs:
    """Runs whose loss is lowest at a rate of 3e-2, and diverges above 0.5; the untrained model's is noted as "base"."""

    def __init__(self) -> None:
        self.made: list[tuple[str, float, int, str | None]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, recipe: Recipe, *, gpu: str | None, base: bool = False) -> dict[str, Any]:
        lr = recipe.optimizer.lr
        with self.lock:
            self.made.append(("base" if base else recipe.adapter.method, lr, recipe.train.seed, gpu))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self.lock:
            self.now -= 1
        return {"validation": abs(math.log(lr / 3e-2)) if lr < 0.5 else None}


def compared(tmp_path: Path, *methods: str, **options: Any) -> tuple[Runs, dict[str, dict[str, Any]]]:
    runs = Runs()
    comparison, contenders = Comparison("tiny_arithmetic", (), 0, tmp_path), read_contenders(list(methods), "")
    return runs, search(contenders[0].recipe(comparison, 0.1, 0), contenders, [1, 2], comparison, runs, **options)


def test_one_job_finishes_a_method_before_the_next(tmp_path: Path) -> None:
    runs, chosen = compared(tmp_path, "neuroada@1e-2,3e-2", "lora@1e-3,1e-2", jobs=1)
    assert runs.made == [
        ("base", 0.1, 0, None),
        ("neuroada", 1e-2, 1, None),
        ("neuroada", 3e-2, 1, None),
        ("neuroada", 3e-2, 2, None),
        ("lora", 1e-3, 1, None),
        ("lora", 1e-2, 1, None),
        ("lora", 1e-2, 2, None),
    ]
    assert chosen["lora"]["lr"] == 1e-2 and list(chosen["lora"]["tries"]) == ["0.001", "0.01"]


def test_several_jobs_choose_the_same_and_share_the_gpus(tmp_path: Path) -> None:
    methods = ("neuroada@1e-3,1e-2,3e-2", "lora@1e-3,1e-2,3e-2", "shira@1e-3,1e-2,3e-2")
    one, chosen = compared(tmp_path, *methods, jobs=1)
    several, same = compared(tmp_path, *methods, jobs=4, gpus=["2", "3"])
    assert same == chosen and list(same) == list(chosen)
    assert sorted(run[:3] for run in several.made) == sorted(run[:3] for run in one.made)
    assert one.most == 1 and several.most == 4
    assert several.made[0][0] == "base"
    assert {run[3] for run in several.made} == {"2", "3"}


def test_seeds_of_a_single_rate_run_at_once(tmp_path: Path) -> None:
    runs, chosen = compared(tmp_path, "neuroada@1e-2", jobs=2, widen=True)
    assert runs.most == 2 and sorted(run[2] for run in runs.made if run[0] != "base") == [1, 2]
    assert chosen["neuroada"] == {"lr": 1e-2, "tries": {"0.01": pytest.approx(math.log(3))}}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failed_run_ends_the_search(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(UserError, match=r"--methods lora: diverged at every learning rate of \[0.6, 0.7\]"):
        compared(tmp_path, "lora@0.6,0.7", "neuroada@1e-2,3e-2", jobs=jobs)


def test_nothing_waits_for_the_untrained_model(tmp_path: Path) -> None:
    """Of several jobs: scoring it on all tasks may take as long as a run."""
    trained = threading.Event()

    def run(recipe: Recipe, *, gpu: str | None, base: bool = False) -> dict[str, Any]:
        if base:
            assert trained.wait(timeout=60)
        else:
            trained.set()
        return {"validation": 1.0}

    contenders, comparison = read_contenders(["neuroada@1e-2"], ""), Comparison("tiny_arithmetic", (), 0, tmp_path)
    search(contenders[0].recipe(comparison, 1e-2, 1), contenders, [1], comparison, run, jobs=2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_untrained_model_that_cannot_be_measured_ends_the_search(tmp_path: Path, jobs: int) -> None:
    def run(recipe: Recipe, *, gpu: str | None, base: bool = False) -> dict[str, Any]:
        if base:
            raise UserError("model: cannot be read")
        return {"validation": 1.0}

    contenders, comparison = read_contenders(["neuroada@1e-2"], ""), Comparison("tiny_arithmetic", (), 0, tmp_path)
    with pytest.raises(UserError, match="model: cannot be read"):
        search(contenders[0].recipe(comparison, 1e-2, 1), contenders, [1], comparison, run, jobs=jobs)


def test_widening_tries_until_the_best_rate_is_between_others(tmp_path: Path) -> None:
    runs, chosen = compared(tmp_path, "neuroada@1e-3,3e-3", "lora@0.3,0.4", jobs=1, widen=True)
    assert chosen["neuroada"]["lr"] == 0.03 and ("neuroada", 0.03, 2, None) in runs.made
    assert list(chosen["neuroada"]["tries"]) == ["0.001", "0.003", "0.009", "0.03", "0.1"]
    lower, best, *_, highest = map(float, chosen["lora"]["tries"])
    assert lower < best == chosen["lora"]["lr"] < 0.3 and highest == 0.4


def test_widening_ends_where_every_further_rate_is_better(tmp_path: Path) -> None:
    def run(recipe: Recipe, *, gpu: str | None, base: bool = False) -> dict[str, Any]:
        return {"validation": recipe.optimizer.lr}

    contenders, comparison = read_contenders(["neuroada@1e-3,2e-3"], ""), Comparison("tiny_arithmetic", (), 0, tmp_path)
    base = contenders[0].recipe(comparison, 1e-3, 1)
    tries = search(base, contenders, [1], comparison, run, jobs=1, widen=True)
    assert len(tries["neuroada"]["tries"]) == 2 + WIDENED


def test_beyond() -> None:
    assert beyond({1e-3: 1.0}) is None
    assert beyond({1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5}) is None
    assert beyond({1e-3: 2.0, 3e-3: 1.0}) == 9e-3
    assert beyond({1e-3: 1.0, 3e-3: 2.0, 1e-2: None}) == 3e-4
    assert beyond({1.0: None, 2.0: None}) == 0.5
    # Rounded to one digit these would be rates that were tried: a search that never ends.
    assert beyond({1e-3: 2.0, 1.2e-3: 1.0}) == pytest.approx(1.44e-3)
    assert beyond({1.2e-3: 1.0, 1.3e-3: 2.0}) == 1e-3
    assert beyond({1e-3: 1.0, 1.01e-3: 2.0}) == pytest.approx(9.9e-4, rel=1e-3)


def test_the_gpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f")
    assert visible_gpus() == ["3", "GPU-8f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]
