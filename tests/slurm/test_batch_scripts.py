"""The batch scripts without a SLURM: what reaches the ranks, and what of the environment does not."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Stand-ins for scontrol and srun: the second prints its arguments, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"scontrol": "echo NodeName=n1 NodeAddr=127.0.0.1 x", "srun": 'printf "<%s>\\n" "$@"'}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def batch(
    tools: Path, *arguments: str, script: str = "train.sbatch", **environment: str
) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", f"launch/slurm/{script}", *arguments], cwd=REPOSITORY, text=True, capture_output=True,
        env={**kept, "PATH": f"{tools}:{os.environ['PATH']}", **PLAIN, **environment},
    )  # fmt: skip


def test_an_array_tasks_overrides_arrive_as_they_were_given(tools):
    odd = ["a=x y", "b=$(touch leaked) `id`; c", "c=one\ntwo", "d='\"", "e=*", "f="]
    groups = ["--", "train.seed=1", *odd, "--", "train.seed=2", "output_dir=runs/x y"]
    for task, expected in (("0", ["train.seed=1", *odd]), ("1", ["train.seed=2", "output_dir=runs/x y"])):
        done = batch(tools, "tiny", "k=1", *groups, SLURM_ARRAY_TASK_ID=task)
        assert done.returncode == 0, done.stderr
        command = "".join(f"<{one}>\n" for one in ["--recipe", "tiny", "k=1", *expected])
        assert done.stdout.endswith(f"<launch/train.py>\n{command}")
    assert not (REPOSITORY / "leaked").exists()


@pytest.mark.parametrize("task", [None, "2", "08", "-1", "1+1", "x[$(touch leaked)]"])
def test_a_task_without_a_group_of_its_own_is_one_line(tools, task):
    environment = {"SLURM_ARRAY_TASK_ID": task} if task is not None else {}
    done = batch(tools, "tiny", "--", "a=1", "--", "a=2", **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: node n1: ") and done.stderr.count("\n") == 1
    assert not (REPOSITORY / "leaked").exists()


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch"])
@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK"]
)
@pytest.mark.parametrize("value", ["a[$(touch leaked)]", "x", "1 2", "1\n2", "99999999999999999999", "-1"])
def test_slurms_variables_are_numbers_before_they_are_counted_with(tools, script, name, value):
    done = batch(tools, "tiny", script=script, **{name: value})
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"error: node n1: {name} is '") and done.stderr.count("\n") == 1
    assert not (REPOSITORY / "leaked").exists()


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES"])
def test_a_ranks_variables_too(tools, name):
    numbers = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    done = batch(tools, "-c", "pass", script="rank.sh", **{**numbers, name: "a[$(touch leaked)]"})
    assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1
    assert not (REPOSITORY / "leaked").exists()
