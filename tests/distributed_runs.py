"""Run recipes in several ranks over gloo, and read what they recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = {
    "single": ["engine.name=single"],
    "zero1": ["engine.name=deepspeed", "engine.ds_config=zero1"],
    "zero2": ["engine.name=deepspeed", "engine.ds_config=zero2"],
    "zero3": ["engine.name=deepspeed", "engine.ds_config=zero3"],
    "fsdp2": ["engine.name=fsdp2"],
}


class TinyRuns:
    """Short fp32 runs of the tiny recipe: 12 sequences a step, which 1, 2, 3 and 4 ranks divide."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.queued: dict[int, list[dict]] = {}

    def add(self, name: str, engine: str, world_size: int, *overrides: str) -> Path:
        """Queue a run in runs/`name`; returns that folder."""
        output = self.folder / "runs" / name
        fields = [f"model={self.model}", f"output_dir={output}", f"data_dir={self.folder / 'data'}", *ENGINES[engine],
                  "train.global_batch_size=12", "train.micro_batch_size=1", "train.max_steps=8",
                  "checkpoint.every_steps=4", *overrides]  # fmt: skip
        self.queued.setdefault(world_size, []).append({"recipe": "tiny_arithmetic", "overrides": fields})
        return output

    def run(self) -> None:
        """Run what is queued: one group of ranks a world size, its runs one after the other."""
        for world_size, runs in sorted(self.queued.items()):
            run_ranks(world_size, "ranks.py", runs, self.folder)
        self.queued.clear()


def run_ranks(world_size: int, script: str, argument: object, folder: Path) -> str:
    """Run tests/`script` in ranks, with `argument` as a JSON file; a failure shows their last output."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"argument-{world_size}.json"
    path.write_text(json.dumps(argument))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               str(Path(__file__).parent / script), str(path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    output = (done.stdout + done.stderr).splitlines()
    ranks_said = [line for line in output if line.startswith(("[rank", "error:"))]
    assert done.returncode == 0, "\n".join([*ranks_said[-60:], *output[-5:]])
    return done.stdout


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, from a run's metrics.jsonl; no step may stand there twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["loss"] for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def assert_same_curve(
    found: dict[int, float], expected: dict[int, float], relative: float = 1e-5, name: str = ""
) -> None:
    assert found == pytest.approx(expected, rel=relative), name
