"""A method, an objective and a task of another package: registered by entry points, used by every command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neuroada.sources.tiny import make_tiny

PLUGIN = '''
from dataclasses import replace
from pathlib import Path

from neuroada.methods.whole_weights import WholeWeights
from neuroada.objectives.causal_lm import CausalLM
from neuroada.tasks.table import TASKS

TASK = replace(TASKS["arithmetic"], name="toy_sums", objective="toy_objective")


class Norms(WholeWeights):
    """Trains the norms' weights alone."""

    name = "toy_norms"

    def describe(self):
        return "toy norms"

    def attach(self, model, task_type):
        model.requires_grad_(False)
        for name, param in model.named_parameters():
            param.requires_grad_("norm" in name)
        return model


class Doubled(CausalLM):
    """Twice the loss."""

    name = "toy_objective"
    loss_unit = "double nats per answer token"

    def summed_loss(self, model, batch):
        return 2 * super().summed_loss(model, batch)
'''
ENTRY_POINTS = """
[neuroada.methods]
toy_norms = toy_plugin:Norms

[neuroada.objectives]
toy_objective = toy_plugin:Doubled

[neuroada.tasks]
toy_sums = toy_plugin:TASK
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package and a tiny model."""
    folder = tmp_path_factory.mktemp("plugins")
    site = folder / "site"
    info = site / "toy_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "toy_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    make_tiny(folder / "model")
    return folder


def neuroada(world: Path, command: str, *arguments: str) -> str:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, str(world / "site")])
    environment = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "neuroada", command, *arguments]
    done = subprocess.run(
        line,
        env=environment,
        cwd=world,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


FIELDS = ["model=model", "task=toy_sums", "train.global_batch_size=4", "train.max_steps=4", "optimizer.lr=1e-2"]
TOY = ["--recipe", "tiny_arithmetic", *FIELDS, "adapter.method=toy_norms", "checkpoint.every_steps=2"]


def test_train_resume_and_report(world: Path) -> None:
    said = neuroada(world, "train", *TOY, "output_dir=run")
    assert "toy norms" in said and "0 of 4 done" in said
    run = world / "run"
    metadata = json.loads((run / "run.json").read_text())
    assert (metadata["method"], metadata["objective"]) == ("toy norms", "toy_objective")
    assert metadata["trainable"] == 5 * 64
    first = (run / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert "2 of 4 done" in neuroada(world, "train", *TOY, "output_dir=run")
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (
        first, (run / "metrics.jsonl").read_text().splitlines())]  # fmt: skip
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    (run / "report.html").unlink()
    neuroada(world, "report", "run")
    page = (run / "report.html").read_text()
    assert "toy norms" in page and "double nats per answer token" in page
    assert "AutoModelForCausalLM" in (run / "model" / "README.md").read_text()


def test_plan_and_dry_run(world: Path) -> None:
    assert "trainable  320 of" in neuroada(world, "plan", *TOY, "output_dir=planned")
    assert "toy_norms" in neuroada(world, "plan", *TOY, "output_dir=planned", "--compare")
    assert "toy_sums: 20,000 examples" in neuroada(world, "train", *TOY, "output_dir=planned", "--dry-run")
    assert not (world / "planned").exists()


def test_compare(world: Path) -> None:
    arguments = ["--recipe", "tiny_arithmetic", "--methods", "toy_norms", "neuroada:k=2", "--lrs", "1e-2",
                 "--seeds", "1", "--validation", "4", "--out", "comparison", *FIELDS]  # fmt: skip
    neuroada(world, "compare", *arguments)
    rows = json.loads((world / "comparison" / "comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["toy_norms", "neuroada:k=2"]
    assert all(row["test"]["mean"] > 0 for row in rows)


def test_an_unknown_name_is_one_line_with_the_nearest(world: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neuroada", "plan", "--recipe", "tiny_arithmetic", "adapter.method=neurada"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, cwd=world,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == (
        "error: recipe tiny_arithmetic: adapter.method = 'neurada': did you mean neuroada?\n"
    )
