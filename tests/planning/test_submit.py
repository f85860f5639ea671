"""submit.py: the job's size by the planner, and the exact sbatch line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from neuroada.cli.submit import main
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError

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


def test_two_dashes_are_no_value() -> None:
    for given in ("--recipe=--", "--ntasks-per-node=--"):
        with pytest.raises(UserError, match=f"^{given}: -- is no value; give another; see neuroada submit --help$"):
            main(["--recipe", "llama13b_math", given])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus-per-node", "4", "--gpu-memory", "24", "engine.ds_config=zero2"), "zero2 needs"),
        (("--gpus-per-node", "3", "--gpu-memory", "24"), "train.global_batch_size = 8: does not divide over 3 ranks"),
        (("--gpus-per-node", "4", "--gpu-memory", "0"), "--gpu-memory: 0.0 is not allowed"),
        (("--gpus-per-node", "1", f"--nodes={10**20}"), f"over {10**20} ranks; use 8 ranks"),
    ],
)
def test_what_does_not_fit_is_told(arguments: tuple[str, ...], said: str) -> None:
    done = submit("--recipe", "llama13b_math", "train.max_length=256", *arguments)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


SUBMIT = ["--recipe", "tiny_arithmetic", "engine.name=deepspeed", "model=some/model"]


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The line of the error that submit ends in; it is one line."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        main(list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        ["train.seed=1,1"],
        ["train.seed=1,2", "train.seed=3"],
        ["train.seed=1,2", "train.seed=1,2"],
        ["output_dir=runs/a,runs/b"],
        ["model=a/b,c/d"],
        ["train.seed="],
        ["train.seed=1,,2"],
        ["train.seed"],
        ["=1,2"],
        ["train.seed=1 ,2"],
        ["train.seed=1,2\n"],
    ],
)
def test_sweeps_whose_tasks_would_share_a_folder(monkeypatch: pytest.MonkeyPatch, fields: list[str]) -> None:
    assert "--sweep " in told(monkeypatch, *SUBMIT, "--ntasks-per-node", "2", "--sweep", *fields)


@pytest.mark.parametrize("field", ["adapter.k=1,many", "adapter.k=0,1", "trian.seed=1,2", "task=arithmetic,nothing"])
def test_every_task_of_a_sweep_is_checked(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    said = told(monkeypatch, *SUBMIT, "--ntasks-per-node", "2", "--sweep", field)
    assert field.partition(".")[0].partition("=")[0] in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["engine.name=single", "--ntasks-per-node", "2"], "engine.name = single: not on 2 ranks"),
        (["engine.name=single", "--nodes", "2", "--gpus-per-node", "1"], "engine.name = single: not on 2 ranks"),
        (["task=nothing", "--ntasks-per-node", "2"], "nothing"),
        (["model=./nowhere", "--ntasks-per-node", "2"], "nowhere"),
        (["--nodes", "0", "--ntasks-per-node", "2"], "--nodes: 0 is not allowed"),
        (["--ntasks-per-node", "-1"], "ntasks-per-node: -1 is not allowed"),
        (["--ntasks-per-node", "1e9"], "invalid int value"),
        (["train.global_batch_size=8", "--ntasks-per-node", "3"], "does not divide over 3 ranks"),
    ],
)
def test_a_job_that_cannot_run_is_not_submitted(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    assert said in told(monkeypatch, *SUBMIT, *arguments)


@pytest.mark.parametrize("value", ["a b", "a;b", "$(touch leaked)", "`id`", "'", '"', "*", "a\\b", "{x}"])
def test_odd_values_stay_one_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """The line is for a shell; each override must come out of it as it was given."""
    monkeypatch.chdir(ROOT)
    override = f"provenance={json.dumps(value)}"
    main([*SUBMIT, override, "--ntasks-per-node", "2", "--sweep", "train.seed=1,2"])
    line = capsys.readouterr().out.splitlines()[0]
    words = shlex.split(line)
    at = words.index("launch/slurm/train.sbatch")
    folder = load_recipe("tiny_arithmetic").output_dir
    groups = [
        word for seed in (1, 2) for word in ("--", f"train.seed={seed}", f"output_dir={folder}/train.seed={seed}")
    ]
    assert words[at + 1 :] == ["tiny_arithmetic", "engine.name=deepspeed", "model=some/model", override, *groups]
