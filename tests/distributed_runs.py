"""Run recipes in several ranks over gloo, and read what they recorded."""

import functools
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
RANKS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}


class TinyRuns:
    """Short fp32 runs of the tiny recipe: 12 sequences a step, which 1, 2, 3 and 4 ranks divide."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.queued: dict[str, tuple[int, dict]] = {}  # name -> ranks, run
        self.names: set[str] = set()

    def add(self, name: str, engine: str, world_size: int, *overrides: str) -> Path:
        """Queue a run in runs/`name`; returns that folder."""
        output = self.folder / "runs" / name
        assert name not in self.names, f"another test has a run called {name}"
        self.names.add(name)
        fields = [f"model={self.model}", f"output_dir={output}", f"data_dir={self.folder / 'data'}", *ENGINES[engine],
                  "train.global_batch_size=12", "train.micro_batch_size=1", "train.max_steps=8",
                  "checkpoint.every_steps=4", *overrides]  # fmt: skip
        self.queued[name] = world_size, {"recipe": "tiny_arithmetic", "overrides": fields}
        return output

    def run(self) -> None:
        """Run what is queued: one group of ranks a world size, its runs one after the other. If ranks fail, what did
        not run stays queued, and a test that is run again may add it again."""
        for ranks in sorted({ranks for ranks, _ in self.queued.values()}):
            group = {name: run for name, (size, run) in self.queued.items() if size == ranks}
            try:
                run_ranks(ranks, "ranks.py", list(group.values()), self.folder)
            except BaseException:
                self.names -= self.queued.keys()
                raise
            for name in group:
                del self.queued[name]


def run_ranks(world_size: int, script: str, argument: object, folder: Path, **environment: str) -> str:
    """Run tests/`script` in ranks, with `argument` as a JSON file; what they printed. A failure shows its end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"argument-{world_size}.json"
    path.write_text(json.dumps(argument))
    out, err = folder / f"ranks-{world_size}.out", folder / f"ranks-{world_size}.err"
    for file in (out, err):
        file.unlink(missing_ok=True)
    case = {"script": str(Path(__file__).parent / script), "arguments": [str(path)], "ranks": world_size,
            "environment": {**os.environ, **RANKS, **environment}, "out": str(out), "err": str(err)}  # fmt: skip
    server = rank_server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(case) + "\n")
    server.stdin.flush()
    statuses = json.loads(server.stdout.readline())
    lines = (out.read_text() + err.read_text()).splitlines()
    assert not any(statuses), "\n".join([f"exit statuses {statuses}", *lines[-60:]])
    return out.read_text()


@functools.cache
def rank_server() -> "subprocess.Popen[str]":
    """The process that forks this test process's ranks; it ends with its standard input."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "rank_server.py")],
        env={**os.environ, **RANKS}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


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
