"""Attempts on `neuroada submit`: what reaches sbatch, and what the batch script passes on to the ranks of each task.

Programs of the world stand for SLURM's: they write down what they were given.
"""

import itertools
import os
import random
import shlex
import shutil
import subprocess
from pathlib import Path

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError

SUBMIT = ["--recipe", "recipe.yaml", "--ntasks-per-node", "1", "--yes", "engine.name=single"]
BATCH = "launch/slurm/train.sbatch"
PROGRAMS = {
    "sbatch": 'printf "%s\\0" "$@" > submitted',
    "srun": 'printf "%s\\0" "$@" > ranks',
    "scontrol": "echo NodeName=n1 NodeAddr=127.0.0.1 x",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURMD_NODENAME": "n1"}
NUMBERS = ["SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK"]
CODE = ["a[$(touch leaked)]", "$(touch leaked)", "`touch leaked`", "1;touch leaked", "x", "1 2", "1\n2", "-1", "9" * 20]
SHELL = [*CODE, "1,1", "1,2", "1,,2", "", ",", "a b,c", "'", '"', "*", "--", "\\", "~", "{1,2}", "1,2\n", "$HOME", "é"]
SEEDS = ["1", "3", "1,2", "3,5", "1,2,3", "2,1"]
FIELDS = ["train.seed", "adapter.k", "optimizer.lr", "provenance", "task", "model", "data_dir", "a.b", "",
          "train.seed ", "engine.name", "train.global_batch_size", "adapter.target_modules"]  # fmt: skip
OPTIONS = ["--nodes", "--time", "--gpu-memory", "--ntasks-per-node", "--sbatch", "--gpus-per-node", "--recipe"]


def make_slurm(world: Path) -> None:
    """The batch scripts, and programs that stand for SLURM's."""
    shutil.copytree(Path(__file__).parents[2] / "launch" / "slurm", world / "launch" / "slurm")
    (world / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (world / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (world / "bin" / name).chmod(0o755)


def odd_submission(_: list[str], rng: random.Random) -> tuple[list[str], str]:
    """A sweep, an override or an option with odd values."""
    kind = rng.choice(["sweep", "sweep", "override", "option"])
    if kind == "sweep":
        fields = [f"{_field(rng)}={rng.choice([*SHELL, *SEEDS])}" for _ in range(rng.choice([1, 2]))]
        more = ["--sweep", *fields]
    elif kind == "override":
        more = [f"{_field(rng)}={rng.choice([*SHELL, *SEEDS])}"]
    else:
        more = [f"{rng.choice(OPTIONS)}={rng.choice([*SHELL, '0', '2', '1e9', '00:10:00', '--mem=1G'])}"]
    return [*SUBMIT, *more], " ".join(more)


def _field(rng: random.Random) -> str:
    """Half the time one that takes a text or a number as it comes: what is accepted must arrive."""
    return rng.choice(["provenance", "train.seed", *rng.sample(FIELDS, 2)])


def same_arguments(here: Path, arguments: list[str], printed: str, rng: random.Random) -> str | None:
    """sbatch was given the line that was printed, and each task's ranks the overrides as they were asked for."""
    words = (here / "submitted").read_text().split("\0")[:-1]
    printed = printed.partition("\n")[2] if printed.startswith("plan: ") else printed
    if shlex.split(printed)[: len(words) + 1] != ["sbatch", *words]:
        return "silently wrong: another line was printed than submitted"
    given = words[words.index(BATCH) + 1 :]
    swept = arguments[arguments.index("--sweep") + 1 :] if "--sweep" in arguments else []
    plain = [word for word in arguments[: len(arguments) - len(swept)] if not word.startswith("-") and "=" in word]
    fields = [field.partition("=") for field in swept]
    tasks = list(itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in fields)))
    folders = set()
    for number, task in enumerate(tasks):
        found = _ranks(here, given, {"SLURM_ARRAY_TASK_ID": str(number)} if swept else {})
        own = found[4:] if found[:3] == ["launch/slurm/rank.sh", "launch/train.py", "--recipe"] else []
        if own[: len(plain) + len(task)] != [*plain, *task]:
            return f"silently wrong: task {number} is given {found}"
        try:
            folders.add(load_recipe(str(here / "recipe.yaml"), own).output_dir)
        except UserError as error:
            return f"task {number} was submitted and cannot run: {error}"
    if len(folders) != len(tasks):
        return "silently wrong: two tasks share a folder"
    return _code_in_a_number(here, given, rng)


def _code_in_a_number(here: Path, given: list[str], rng: random.Random) -> str | None:
    """The batch script with an odd variable of SLURM's ends in one line."""
    name, value = rng.choice(NUMBERS), rng.choice(CODE)
    (here / "ranks").unlink()
    done = _batch(here, given, {name: value})
    if done.returncode != 2 or done.stderr.count("\n") != 1 or (here / "ranks").exists():
        return f"{name}={value!r}: status {done.returncode}, {done.stderr[:200]!r}"
    return "code in a variable was executed" if (here / "leaked").exists() else None


def _ranks(here: Path, given: list[str], environment: dict[str, str]) -> list[str]:
    """What one task's ranks are given."""
    done = _batch(here, given, environment)
    if done.returncode:
        return [done.stderr]
    words = (here / "ranks").read_text().split("\0")[:-1]
    return words[words.index("launch/slurm/rank.sh") :]


def _batch(here: Path, given: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", BATCH, *given], cwd=here, text=True, capture_output=True,
        env={**plain, "PATH": f"{here / 'bin'}:{os.environ['PATH']}", **SLURM, **environment},
    )  # fmt: skip
