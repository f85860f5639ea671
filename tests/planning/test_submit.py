"""submit.py: the job's size by the planner, and the exact sbatch line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    return subprocess.run([sys.executable, "launch/submit.py", *arguments],
                          cwd=ROOT, env=environment, text=True, capture_output=True)  # fmt: skip


def test_the_fewest_nodes_that_hold_the_recipe() -> None:
    done = submit("--recipe", "llama13b_math", "--gpus-per-node", "2", "--gpu-memory", "24",
                  "engine.ds_config=zero3", "train.max_length=256")  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan, line, remedy = done.stdout.splitlines()
    assert plan.startswith("plan: ") and plan.endswith("with zero3 on 1 node(s) of 2")
    assert line == (
        "sbatch --nodes=1 --ntasks-per-node=2 --job-name=llama13b_math --gpus-per-node=2 "
        "--output=runs/llama13b_math/slurm-%j.out launch/slurm/train.sbatch llama13b_math engine.ds_config=zero3 "
        "train.max_length=256"
    )
    assert remedy == "add --yes to submit it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus-per-node", "4", "--gpu-memory", "24", "engine.ds_config=zero2"), "zero2 needs"),
        (("--gpus-per-node", "3", "--gpu-memory", "24"), "train.global_batch_size = 8: does not divide over 3 ranks"),
        (("--gpus-per-node", "4", "--gpu-memory", "0"), "--gpu-memory: 0.0 is not allowed"),
    ],
)
def test_what_does_not_fit_is_told(arguments: tuple[str, ...], said: str) -> None:
    done = submit("--recipe", "llama13b_math", "train.max_length=256", *arguments)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
