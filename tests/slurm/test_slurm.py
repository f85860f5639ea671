"""Real jobs on a real SLURM of two nodes: batch scripts, signals, requeueing, faults, mistakes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs, wait_until
from distributed_runs import assert_same_curve, losses

from neuroada.config.recipe import load_recipe
from neuroada.sources.tiny import make_tiny

REPOSITORY = Path(__file__).resolve().parents[2]
ZERO3 = ("engine.name=deepspeed", "engine.ds_config=zero3")
FSDP2 = ("engine.name=fsdp2",)
STEPS = 240
START_SECONDS = 400  # of a start on a busy machine

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Jobs:
    """Submits the tiny recipe; the site file of these jobs can be written by a test."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.model = make_tiny(folder / "tiny")
        self.site = folder / "site.sh"

    def overrides(self, name: str, *more: str) -> list[str]:
        return [f"model={self.model}", f"data_dir={self.folder / 'data'}", f"output_dir={self.folder / name}",
                f"train.max_steps={STEPS}", "checkpoint.every_steps=30", *more]  # fmt: skip

    def submit(self, name: str, *more: str, options: tuple[str, ...] = ("--nodes=2",), site: str = "") -> str:
        self.site.write_text(f"PYTHON=({sys.executable})\nexport TQDM_DISABLE=1 DS_ACCELERATOR=cpu\n{site}")
        (self.folder / name).mkdir(exist_ok=True)
        environment = self.cluster.env | {"NEUROADA_SITE": str(self.site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["sbatch", "--parsable", *options, f"--output={self.log(name)}", "launch/slurm/train.sbatch",
             "tiny_arithmetic", *self.overrides(name, *more)],
            env=environment, cwd=REPOSITORY, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def errors(self, name: str) -> list[str]:
        return [line for line in self.log(name).read_text().splitlines() if line.startswith("error:")]

    def wait_for_step(self, name: str, step: int) -> None:
        file = self.folder / name / "metrics.jsonl"
        wait_until(
            lambda: file.exists() and file.read_text().count("\n") >= step, START_SECONDS, f"{name}: step {step}"
        )

    def checkpoints(self, name: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.folder / name / "checkpoints").glob("step-*"))

    def ranks(self, name: str) -> list[int]:
        """Process ids of the job's ranks on this machine."""
        wanted = f"output_dir={self.folder / name}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_bytes().split(b"\0")
            except OSError:  # ended meanwhile
                continue
            if b"launch/train.py" in arguments and wanted in arguments and b"python" in arguments[0]:
                found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def curve(jobs: Jobs) -> dict[int, float]:
    """The losses of the same recipe in one process that nobody disturbs."""
    command = [sys.executable, "launch/train.py", "--recipe", "tiny_arithmetic"]
    overrides = jobs.overrides("one_process", "engine.name=single")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run([*command, *overrides], cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    return losses(jobs.folder / "one_process")


def test_usr1_and_term_save_requeue_and_resume(jobs: Jobs, cluster: Cluster, curve: dict[int, float]) -> None:
    job = jobs.submit("zero3", *ZERO3)
    jobs.wait_for_step("zero3", 10)
    cluster.run("scancel", "--signal=TERM", job)  # to every rank
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", 60, "the requeue")
    first = jobs.checkpoints("zero3")
    assert len(first) == 1 and first[0] >= 10

    jobs.wait_for_step("zero3", first[0] + 10)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # the script passes it on: a copy of the same request
    wait_until(lambda: cluster.job(job)["Restarts"] == "2", 60, "the second requeue")
    assert jobs.checkpoints("zero3")[-1] > first[0]

    assert cluster.wait_for_end(job, START_SECONDS)["JobState"] == "COMPLETED"
    assert_same_curve(losses(jobs.folder / "zero3"), curve)
    assert "2 rank(s), cpu, on 2 node(s): n1, n2" in jobs.log("zero3").read_text()
    assert f"steps       {first[0]} of {STEPS} done" in jobs.log("zero3").read_text()


def test_fsdp2_on_two_nodes_equals_one_process(jobs: Jobs, cluster: Cluster, curve: dict[int, float]) -> None:
    job = jobs.submit("fsdp2", *FSDP2, options=("--nodes=2", "--ntasks-per-node=2"))
    assert cluster.wait_for_end(job, START_SECONDS)["JobState"] == "COMPLETED"
    assert_same_curve(losses(jobs.folder / "fsdp2"), curve)
    assert "4 rank(s), cpu, on 2 node(s): n1, n2" in jobs.log("fsdp2").read_text()


@pytest.mark.long  # stops a node's slurmd and waits for SLURM to miss it: minutes, and as long as the machine is busy
def test_faults_end_the_job_and_the_next_start_goes_on(jobs: Jobs, cluster: Cluster, curve: dict[int, float]) -> None:
    job = jobs.submit("faults", *FSDP2)
    jobs.wait_for_step("faults", 35)
    os.kill(max(jobs.ranks("faults")), signal.SIGKILL)
    assert cluster.wait_for_end(job, 120)["JobState"] == "FAILED"
    assert jobs.checkpoints("faults") == [30]

    job = jobs.submit("faults", *FSDP2)
    jobs.wait_for_step("faults", 62)  # more than the first job can have left behind
    cluster.stop_node("n2")
    try:
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", 120, "the requeue after the node's failure")
        wait_until(lambda: not jobs.ranks("faults"), 120, "the end of the ranks, on the lost node too")
    finally:
        cluster.start_node("n2")
    assert jobs.checkpoints("faults")[-1] >= 60
    wait_until(lambda: cluster.job(job)["JobState"] == "RUNNING", 120, "the job's next start")
    assert cluster.wait_for_end(job, START_SECONDS)["JobState"] == "COMPLETED"
    assert_same_curve(losses(jobs.folder / "faults"), curve)


def test_scancel_saves_and_ends_for_good(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit("cancelled", *FSDP2)
    jobs.wait_for_step("cancelled", 5)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, 60)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"
    assert len(jobs.checkpoints("cancelled")) == 1


def test_recipe_that_differs_on_one_node(jobs: Jobs, cluster: Cluster) -> None:
    site = '[[ $SLURMD_NODENAME != n2 ]] || set -- "$@" train.seed=7\n'
    job = jobs.submit("differs", *FSDP2, site=site)
    assert cluster.wait_for_end(job, START_SECONDS)["ExitCode"] == "2:0"
    assert jobs.errors("differs") == [
        "error: node n2 (rank 1): train.seed is 7, but 42 on node n1 (rank 0); start every node with the same recipe "
        "and overrides"
    ]


def test_virtual_environment_missing_on_one_node(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit("no_venv", *FSDP2, site="[[ $SLURMD_NODENAME != n2 ]] || PYTHON=(/nowhere/bin/python)\n")
    assert cluster.wait_for_end(job, 180)["JobState"] == "FAILED"
    (line,) = jobs.errors("no_venv")
    assert line.startswith("error: node n2: no /nowhere/bin/python") and str(jobs.site) in line


def test_recipe_file_missing_on_one_node(jobs: Jobs, cluster: Cluster) -> None:
    job = jobs.submit("no_file", *FSDP2, site='[[ $SLURMD_NODENAME != n2 ]] || set -- "$1" --recipe nothing\n')
    assert cluster.wait_for_end(job, 180)["JobState"] == "FAILED"
    (line,) = jobs.errors("no_file")
    assert line.startswith("error: node n2: --recipe nothing: no such recipe")


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("--nodes=2", "--ntasks=3"), "", "3 task(s) on 2 nodes"),
        (("--nodes=2",), "SLURM_GPUS_ON_NODE=8 ", "2 task(s) for 16 GPUs, must be one for each; give sbatch --ntasks"),
    ],
)
def test_too_few_tasks(jobs: Jobs, cluster: Cluster, options: tuple[str, ...], environment: str, message: str) -> None:
    log = jobs.folder / "tasks.out"
    wrapped = f"{environment}bash launch/slurm/train.sbatch tiny_arithmetic"
    number = cluster.run(
        "sbatch", "--parsable", *options, f"--output={log}", f"--wrap={wrapped}", cwd=REPOSITORY
    ).strip()
    assert cluster.wait_for_end(number, 60)["ExitCode"] == "2:0"
    assert log.read_text().startswith(f"error: node n1: {message}")
    log.unlink()


def test_array_gives_each_task_its_own_overrides(jobs: Jobs, cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "launch/submit.py", "--recipe", "tiny_arithmetic", "--ntasks-per-node", "1", "--yes",
         *jobs.overrides("sweep", "train.max_steps=2", "engine.name=single"), "--sweep", "train.seed=1,2"],
        env=cluster.env | {"NEUROADA_SITE": str(jobs.site)}, cwd=REPOSITORY, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    wait_until(
        lambda: not cluster.run("squeue", "-h", "-j", job, check=False).strip(), START_SECONDS, "the sweep's end"
    )
    seeds = [load_recipe(str(path)).train.seed for path in sorted((jobs.folder / "sweep").glob("*/recipe.yaml"))]
    assert seeds == [1, 2]


def test_evaluation_on_two_nodes(jobs: Jobs, cluster: Cluster) -> None:
    log, out = jobs.folder / "evaluate.out", jobs.folder / "evaluated"
    jobs.site.write_text(f"PYTHON=({sys.executable})\nexport TQDM_DISABLE=1\n")
    number = cluster.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={log}", f"--export=ALL,NEUROADA_SITE={jobs.site}",
        "launch/slurm/evaluate.sbatch", "--model", str(jobs.model), "--tasks", "arithmetic", "--limit", "6",
        "--data-dir", str(jobs.folder / "data"), "--out", str(out), cwd=REPOSITORY,
    ).strip()  # fmt: skip
    assert cluster.wait_for_end(number, START_SECONDS)["JobState"] == "COMPLETED", log.read_text()
    assert json.loads((out / "results.json").read_text())["tasks"]["arithmetic"]["n"] == 6


def test_outside_slurm_is_refused() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    for cwd, message in ((REPOSITORY, "not in a SLURM job"), (REPOSITORY / "tests", "no launch/slurm/job.sh in")):
        script = REPOSITORY / "launch" / "slurm" / "train.sbatch"
        done = subprocess.run(
            ["bash", script, "tiny_arithmetic"], cwd=cwd, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: node ") and message in done.stderr and done.stderr.count("\n") == 1
