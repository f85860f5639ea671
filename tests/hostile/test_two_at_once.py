"""Two commands in one folder: one does its work, the other is told in one line; then the folder is whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from file_server import serving
from judge import snapshot
from lives import Life
from world import TRAIN, make_world

ROOT = Path(__file__).resolve().parents[2]
MERGE = ["merge", "--adapter", "adapter", "--out", "out"]
EVALUATE = ["evaluate", "--adapter", "run/adapter", "--tasks", "AddSub", "--out", "out"]
FRESH = ["train", "--recipe", "recipe.yaml", *TRAIN[:1], "train.global_batch_size=2", "train.epochs=100000",
         "train.max_steps=100000", "output_dir=out"]  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("two") / "clean")


@pytest.fixture
def world(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "world")


def start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    return subprocess.Popen([sys.executable, "-m", "neuroada", *command], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize("command", [MERGE, EVALUATE], ids=["merge", "evaluate"])
def test_two_at_once(world: Path, command: list[str]) -> None:
    both = [start(world, command) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    for process, text in zip(both, said, strict=True):
        assert "Traceback" not in text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert (process.returncode, len(errors)) in ((0, 0), (2, 1)), text
    assert 0 in [process.returncode for process in both]
    if command is MERGE:
        wanted, found = ((world / name / "model.safetensors").read_bytes() for name in ("merged", "out"))
        assert wanted == found
    else:
        assert json.loads((world / "out" / "results.json").read_text())["tasks"]["AddSub"]["n"] == 6
    left = [path for path in snapshot(world) if path.endswith((".lock", ".partial"))]
    assert not [path for path in left if not path.startswith("data/.tokens/")]  # filelock leaves its file


def test_a_second_training_in_the_folder_is_told_while_the_first_runs(world: Path) -> None:
    first = start(world, FRESH)
    try:
        end = time.monotonic() + 120
        while not (world / "out" / "metrics.jsonl").is_file() and time.monotonic() < end:
            time.sleep(0.2)
        second = start(world, FRESH)
        said = second.communicate()[1]
        assert second.returncode == 2 and f"process {first.pid} on " in said and "Traceback" not in said, said
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    third = start(world, [*FRESH, "train.max_steps=2"])  # the lock of a killed process is no hindrance
    said = third.communicate()[1]
    assert "train.max_steps is 100000 there and 2 in this run" in said, said


def test_a_full_disk_at_every_write(world: Path) -> None:
    """Of a training on a small file system, which is given more space each time: one line, and the same command goes on
    where it was, to the undisturbed run's result."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here: a small file system cannot be made")
    mount, sizes = world / "disk", ("8k", "40k", "80k", "8m")
    mount.mkdir()
    command = f"{sys.executable} -m neuroada train --recipe recipe.yaml {' '.join(TRAIN)} output_dir={mount}/run"
    one = "mount -o remount,size={size} {mount} || exit 99; {command} 2> said-{size}; echo $?"
    script = "; ".join(  # in one namespace: with it goes what was written
        [f"mount -t tmpfs -o size=8k tmpfs {mount} || exit 99",
         *(one.format(size=size, mount=mount, command=command) for size in sizes),
         f"cp -r {mount}/run filled"]
    )  # fmt: skip
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=world, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"})  # fmt: skip
    said = [(world / f"said-{size}").read_text() for size in sizes]
    statuses = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    assert statuses[0] == 2 and statuses[-1] == 0 and set(statuses) == {0, 2}, (done, said)
    for text, status in zip(said, statuses, strict=True):
        assert "Traceback" not in text, text
        assert len([line for line in text.splitlines() if line.startswith("error: ")]) == status // 2, text
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000002/state.safetensors"):
        assert (world / "filled" / file).read_bytes() == (world / "run" / file).read_bytes()
    assert not [path for path in snapshot(world / "filled") if path.endswith((".lock", ".partial", ".old"))]


KILLED = {
    "merge": MERGE,
    "export": ["export", "--as", "shira", "--adapter", "adapter", "--out", "out"],
    "select": ["select", "--model", "model", "--k", "2", "--target-modules", "q_proj", "down_proj", "--out", "out"],
    "train": ["train", "--recipe", "recipe.yaml", *TRAIN, "output_dir=out"],
    "evaluate": EVALUATE,
    "quantise": ["quantise", "--model", "model", "--format", "int8", "--exact", "2", "--out", "out"],
    "fetch model": ["fetch", "model", "tiny", "--out", "out"],
    "fetch data": ["fetch", "data", "AddSub", "--out", "out"],
}  # fmt: skip
RESULTS = {"merge": "model.safetensors", "export": "adapter_model.safetensors", "select": "",
           "train": "adapter/adapter_model.safetensors", "evaluate": "predictions/AddSub.jsonl",
           "quantise": "model.safetensors", "fetch model": "model.safetensors",
           "fetch data": "AddSub/test.json"}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments(clean: Path, world: Path, name: str) -> None:
    """Ctrl-C, SIGTERM and SIGKILL, then the same command: the result of an undisturbed one, and nothing left."""
    with serving(clean, world):
        _killed(clean, world, name)


def _killed(clean: Path, world: Path, name: str) -> None:
    command, rng = KILLED[name], random.Random(name)
    Life(clean, ["evaluate", "--help"]).end()  # starts the process that the others are forked from
    started = time.monotonic()
    status, said = Life(clean, [*command[:-1], command[-1].removesuffix("out") + "whole"]).end()
    assert status == 0, said
    seconds = time.monotonic() - started
    for number in range(12):
        life = Life(world, command)
        time.sleep(rng.uniform(0, 1.1) * seconds)
        life.send((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[number % 3])
        status, said = life.end()
        assert status in (0, 75, 130, -signal.SIGKILL, -signal.SIGTERM), said
        whole = world / "out" / (RESULTS[name] if name == "fetch data" else "")
        if whole.exists() and name not in ("train", "evaluate"):  # as it should be, and not written over
            assert _result(world / "out", name) == _result(clean / "whole", name)
            _remove(world / "out")
    status, said = Life(world, command).end()
    assert status == 0, said
    assert _result(world / "out", name) == _result(clean / "whole", name)
    expected = {path.replace("whole", "out", 1) for path in snapshot(clean)}
    _remove(clean / "whole")
    assert {path for path in snapshot(world) if "/tensorboard/" not in path} == {
        path for path in expected if "/tensorboard/" not in path
    }


def _result(folder: Path, name: str) -> bytes:
    return (folder / RESULTS[name]).read_bytes()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
