import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from neuroada.config.recipe import Recipe, load_recipe
from neuroada.engines import collectives
from neuroada.engines.fsdp2 import Fsdp2Engine
from neuroada.errors import UserError
from neuroada.training import preflight
from neuroada.training.checkpoint import find_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINE: Any = SimpleNamespace(rank=0, world_size=2, device=torch.device("cpu"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("tiny_arithmetic", [f"output_dir={tmp_path / 'run'}"])


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let rank 1 on node n2 say what a function makes of each thing rank 0 on node n1 says."""
    monkeypatch.setenv("SLURMD_NODENAME", "n1")

    def set_answers(*answers: Callable[[Any], Any]) -> None:
        left = list(answers)
        for module in (collectives, preflight):
            monkeypatch.setattr(module, "gather", lambda engine, mine: [mine, left.pop(0)(mine)])

    return set_answers


def same(mine: Any) -> Any:
    return mine


@pytest.mark.parametrize(
    ("kind", "field", "value", "remedy"),
    [
        ("recipe", "optimizer.lr", "0.5", "start every node with the same recipe and overrides"),
        ("code", "neuroada", "0.0.9+0123456789", "let every node use the same checkout"),
        ("library", "torch", "1.13.0", "let every node use the same environment"),
        ("data", "the data's fingerprint", "beef", "let data_dir hold the same files on every node"),
        ("checkpoints", "the newest checkpoint", "step-000010", "let output_dir be one folder that all nodes share"),
    ],
)
def test_a_rank_that_differs_is_named(recipe, second_rank, kind: str, field: str, value: str, remedy: str) -> None:
    second_rank(lambda mine: ("n2", {**mine[1], (kind, field): value}))
    with pytest.raises(UserError) as caught:
        preflight.check_ranks(ENGINE, recipe, "f00d")
    line = str(caught.value)
    assert line.startswith(f"node n2 (rank 1): {field} is {value}, but ") and line.endswith(
        f" on node n1 (rank 0); {remedy}"
    )
    assert not Path(recipe.output_dir).exists()


def test_ranks_that_agree_pass_and_leave_nothing(recipe, second_rank) -> None:
    second_rank(lambda mine: ("n2", mine[1]), same, same)
    preflight.check_ranks(ENGINE, recipe, "f00d")
    assert list(Path(recipe.output_dir).iterdir()) == []


def test_folder_that_is_not_shared(recipe, second_rank) -> None:
    second_rank(lambda mine: ("n2", mine[1]), same, lambda mine: False)
    with pytest.raises(UserError, match="run: node n2 does not see there what node n1 writes; choose a folder all"):
        preflight.check_ranks(ENGINE, recipe, "f00d")


def test_folder_that_cannot_be_written(recipe, second_rank) -> None:
    Path(recipe.output_dir).write_text("a file")
    second_rank(lambda mine: ("n2", mine[1]), same)
    with pytest.raises(UserError, match=r"output_dir = .*run: cannot be written from node n1 .*File exists"):
        preflight.check_ranks(ENGINE, recipe, "f00d")


def test_a_mistake_on_one_node_ends_every_rank_with_its_name(second_rank) -> None:
    second_rank(lambda mine: ("n2", "data/train.json: no such file"))
    with pytest.raises(UserError, match=r"^node n2: data/train.json: no such file$"), collectives.together(ENGINE):
        pass
    second_rank(same)
    with pytest.raises(UserError, match=r"^k is too large$"), collectives.together(ENGINE):
        raise UserError("k is too large")


def test_space_for_the_checkpoints(recipe, second_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1000, 1000, bias=False)  # 12 MB a checkpoint; keep = 2, so three are needed
    Path(recipe.output_dir).mkdir()
    for free, fits in ((36_000_000, True), (35_999_999, False)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder, usage=usage: usage)
        second_rank(lambda mine: ("n2", None))
        if fits:
            preflight.check_space(ENGINE, recipe, model)
        else:
            with pytest.raises(UserError, match=r"36\.0 MB free, but 3 checkpoints of 12\.0 MB"):
                preflight.check_space(ENGINE, recipe, model)


def test_a_full_disk_ends_with_one_line_and_keeps_the_newest_checkpoint(tiny: Path, tmp_path: Path) -> None:
    fields = [f"model={tiny}", f"data_dir={tmp_path / 'data'}", f"output_dir={tmp_path / 'run'}",
              "train.max_steps=80", "checkpoint.every_steps=5", "engine.name=single"]  # fmt: skip
    command = [sys.executable, "launch/train.py", "--recipe", "tiny_arithmetic", *fields]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
    while find_checkpoint(tmp_path / "run") is None:
        assert process.poll() is None
        time.sleep(0.02)
    # From now on no file grows past 30 KB: as a full disk to a checkpoint of 49 KB.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    _, told = process.communicate(timeout=600)
    assert process.returncode == 2 and "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    newest = find_checkpoint(tmp_path / "run")
    assert newest is not None
    failed = int(newest.name[5:]) + 5
    assert f"the checkpoint of step {failed} could not be written (" in line and (
        "too large" in line or "larger than" in line
    )
    assert f"it goes on from {newest}" in line
    assert list(newest.parent.glob(".*")) == []

    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 81))


def test_a_mistake_that_the_others_never_come_to_hear_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setattr(collectives, "ALONE_SECONDS", 0.05)

    def lost(engine: Any, mine: Any) -> list[Any]:
        time.sleep(0.5)  # the other ranks wait somewhere else
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(collectives, "gather", lost)
    with pytest.raises(RuntimeError), collectives.together(SimpleNamespace(rank=3, world_size=4)):
        raise UserError("model = /nowhere: no such folder")
    assert capsys.readouterr().err == "error: node n2 (rank 3): model = /nowhere: no such folder\n"


def test_fsdp2_is_refused_by_a_torch_that_cannot_shard_integers(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    told = r"FSDP2 of torch 2.11.0\+cu130 cannot shard integers, the indices; install torch 2.12 or newer"
    with pytest.raises(UserError, match=told):
        Fsdp2Engine(recipe)
