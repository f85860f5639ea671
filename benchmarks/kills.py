"""Kill a random rank at a random moment, again and again, and see whether the run survives it.

    python benchmarks/kills.py [--kills 50] [--engine engine.name=fsdp2] [--seed 0]

Two ranks of recipe tiny_arithmetic train, under ZeRO-3 unless told otherwise. A third of the kills fall into the start,
a third onto a moment of training, a third into the writing of a checkpoint. After each kill: does the other rank end by
itself, is the newest checkpoint whole, how many finished steps are lost? At the end the joined loss curve is compared
with that of a run which nobody disturbed.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from neuroada.sources.tiny import make_tiny
from neuroada.training.checkpoint import find_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = 2
LAUNCHER_SECONDS = 60.0  # then a launcher ends the other ranks, as srun --wait does in launch/slurm
PHASES = ("start", "training", "saving")


class Life:
    """One start of the run, as a launcher would start it, but in processes that have imported everything already."""

    def __init__(self, overrides: list[str], port: int, log: Path) -> None:
        command = ["launch/train.py", "--recipe", "tiny_arithmetic", *overrides]
        fork = multiprocessing.get_context("fork")
        self.ranks = [fork.Process(target=run_rank, args=(rank, command, port, log)) for rank in range(RANKS)]
        for rank in self.ranks:
            rank.start()

    def over(self) -> bool:
        return any(rank.exitcode is not None for rank in self.ranks)

    def wait(self, condition: Callable[[], object], tick: float = 0.02) -> None:
        """Until `condition` holds or a rank ends."""
        while not condition() and not self.over():
            time.sleep(tick)


def run_rank(rank: int, command: list[str], port: int, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = command
    runpy.run_path(str(REPOSITORY / command[0]), run_name="__main__")


def partials(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when their writer died."""
    found = set()
    for path in (folder / "checkpoints").glob(".step-*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def kill_once(life: Life, phase: str, folder: Path, resumed: int, draw: random.Random) -> tuple[bool, float]:
    """Wait for the moment, kill; (a checkpoint was being written, seconds until the other rank had ended)."""
    leftovers = partials(folder)
    if phase == "start":
        until = time.monotonic() + draw.uniform(0, 4)
        life.wait(lambda: time.monotonic() > until)
    elif phase == "training":
        step = resumed + draw.randint(1, 10)
        life.wait(lambda: steps_logged(folder) <= resumed)  # the record of steps that were lost is cut off first
        life.wait(lambda: steps_logged(folder) >= step)
        time.sleep(draw.uniform(0, 0.3))
    else:
        life.wait(lambda: partials(folder) - leftovers, tick=0.001)
        time.sleep(draw.uniform(0, 0.003))
    saving = bool(partials(folder) - leftovers)
    victim = draw.randrange(RANKS)
    life.ranks[victim].kill()  # SIGKILL
    started = time.monotonic()
    life.ranks[1 - victim].join(LAUNCHER_SECONDS)
    seconds = time.monotonic() - started
    life.ranks[1 - victim].kill()
    for rank in life.ranks:
        rank.join()
    return saving, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", nargs="+", default=["engine.name=deepspeed", "engine.ds_config=zero3"])
    parser.add_argument("--every", type=int, default=5, help="checkpoint.every_steps")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"), help="is emptied first")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    for module in ("deepspeed", "torch.utils.tensorboard", "neuroada.training.trainer"):
        importlib.import_module(module)  # once for all lives
    draw = random.Random(args.seed)
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    common = [f"model={make_tiny(folder / 'tiny')}", f"data_dir={folder / 'data'}", *args.engine,
              f"train.max_steps={args.max_steps}", f"checkpoint.every_steps={args.every}", "adapter.k=16"]  # fmt: skip
    run, log = folder / "run", folder / "log.txt"

    def start(number: int, output: Path = run) -> Life:
        return Life([*common, f"output_dir={output}"], 21000 + (args.seed * 1000 + number) % 9000, log)

    counts: Counter[str] = Counter()
    lost: list[int] = []
    ended: list[float] = []
    resumed = 0
    for number in range(args.kills):
        phase = PHASES[number % len(PHASES)]
        life = start(number)
        saving, seconds = kill_once(life, phase, run, resumed, draw)
        reached = steps_logged(run)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            newest = find_checkpoint(run)
        step = int(newest.name[5:]) if newest else 0
        counts["corrupt"] += len(caught)
        counts["backwards"] += step < resumed
        counts["saving"] += saving
        counts["launcher"] += seconds >= LAUNCHER_SECONDS
        lost.append(max(0, reached - step))
        if seconds < LAUNCHER_SECONDS:
            ended.append(seconds)
        print(f"kill {number + 1:3}  {phase:8}  reached {reached:4}  goes on from {step:4}  lost {lost[-1]:2}  "
              f"{'in a save  ' if saving else ''}other rank ended after {seconds:.1f} s", flush=True)  # fmt: skip
        resumed = step

    for number, output in ((args.kills, run), (args.kills + 1, folder / "undisturbed")):
        life = start(number, output)
        for rank in life.ranks:
            rank.join()
        assert [rank.exitcode for rank in life.ranks] == [0] * RANKS, f"see {log}"
    joined, whole = (
        [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (run, folder / "undisturbed")
    )
    same_steps = [line["step"] for line in joined] == list(range(1, args.max_steps + 1))
    difference = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(joined, whole, strict=True))
    table = {
        "kills": args.kills,
        "while a checkpoint was written": counts["saving"],
        "resumptions": args.kills - counts["backwards"],
        "corrupt checkpoints": counts["corrupt"],
        f"steps lost, mean / worst (limit {args.every})": f"{sum(lost) / len(lost):.1f} / {max(lost)}",
        "other rank ended by itself": f"{len(ended)}, within {max(ended):.1f} s",
        "by the launcher's limit": counts["launcher"],
        "every step once in the curve": "yes" if same_steps else "NO",
        "worst relative difference of the loss": f"{difference:.1e}",
    }
    print("\n| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in table.items()))
    good = same_steps and difference < 1e-5 and max(lost) <= args.every
    sys.exit(0 if good and not counts["corrupt"] and not counts["backwards"] else 1)


if __name__ == "__main__":
    main()
