"""The guard of a refactor: every method under every strategy loses the same, to the last digit, before and after it.

    python benchmarks/baseline.py record  [--out runs/baseline]      # before the change: `make baseline`
    python benchmarks/baseline.py compare [--out runs/baseline]      # after it: `make compare-baseline`

Runs the commands that users type (launch/train.py) on tiny random models, 6 steps each, on one process or two ranks.
The digits belong to one machine and one set of library versions: record and compare on the same.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTED = {
    "zero1": ["engine.name=deepspeed", "engine.ds_config=zero1"],
    "zero2": ["engine.name=deepspeed", "engine.ds_config=zero2"],
    "zero3": ["engine.name=deepspeed", "engine.ds_config=zero3"],
    "fsdp2": ["engine.name=fsdp2"],
}
RUNS = {  # method -> the strategies it ran under when this guard was written
    "neuroada": ("single", *DISTRIBUTED),
    "lora": ("single", "zero1", "zero2", "zero3"),
    "shira": ("single", "zero1", "zero2"),
    "supertuning": ("single", "zero1", "zero2"),
    "masked": ("single", "zero1", "zero2"),
    "full": ("single", "zero1", "zero2", "zero3"),
}
EXTRA = {  # name -> (strategy, overrides)
    "neuroada-padded": ("single", ["train.packing=false"]),
    "neuroada-bf16": ("single", ["train.dtype=bf16"]),
    "neuroada-gradient": ("zero3", ["adapter.selection=gradient"]),
    "neuroada-checkpointing": ("fsdp2", ["train.activation_checkpointing=true"]),
}
CLASSIFIERS = {"sst2-neuroada": ("neuroada", "single"), "sst2-head": ("head", "zero2")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "baseline")
    args = parser.parse_args()
    models, recorded = args.out / "models", args.out / "losses.json"
    if args.action == "record":
        make_inputs(models, args.out / "data")
    elif not recorded.is_file():
        sys.exit(f"{recorded}: nothing recorded; run `make baseline` on the commit before the change")
    found = {}
    for name, (strategy, overrides) in runs(models, args.out / "data").items():
        found[name] = train(strategy, overrides, args.out / "runs" / name)
        print(f"{name:28} {found[name][0]!r} ... {found[name][-1]!r}", flush=True)
    if args.action == "record":
        recorded.write_text(json.dumps(found, indent=1) + "\n")
        return
    expected = json.loads(recorded.read_text())
    differing = [name for name in expected if found.get(name) != expected[name]]
    for name in differing:
        print(f"{name}: {found.get(name)}\n{'recorded':>{len(name)}}: {expected[name]}")
    print(f"{len(expected) - len(differing)} of {len(expected)} runs equal to the last digit")
    sys.exit(bool(differing))


def make_inputs(models: Path, data: Path) -> None:
    """The two random models, and a miniature of SST-2."""
    sys.path.insert(0, str(ROOT))
    from neuroada.sources.tiny import make_tiny, make_tiny_encoder

    make_tiny(models / "decoder")
    make_tiny_encoder(models / "encoder")
    draw = random.Random(0)
    folder = data / "glue" / "sst2"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 40), ("validation", 21)):
        rows = []
        for _ in range(count):
            label = draw.randrange(2)
            letters = draw.choices(("nopqrst", "abcdefg")[label], k=draw.randrange(2, 12))
            rows.append({"sentence": "".join(letters), "label": label})
        (folder / f"{split}.json").write_text(json.dumps(rows))


def runs(models: Path, data: Path) -> dict[str, tuple[str, list[str]]]:
    """name -> (strategy, recipe and overrides)."""
    decoder = ["--recipe", "tiny_arithmetic", f"model={models / 'decoder'}", f"data_dir={data}",
               "train.global_batch_size=12", "train.micro_batch_size=2", "train.max_steps=6",
               "adapter.rank=2", "adapter.sparsity=0.95"]  # fmt: skip
    encoder = ["--recipe", "minilm_sst2", f"model={models / 'encoder'}", f"data_dir={data}", "adapter.k=3",
               "train.global_batch_size=12", "train.micro_batch_size=2", "train.max_steps=6",
               "evaluate.frozen_base=false"]  # fmt: skip
    found = {
        f"{method}-{strategy}": (strategy, [*decoder, f"adapter.method={method}"])
        for method, strategies in RUNS.items()
        for strategy in strategies
    }
    found |= {name: (strategy, [*decoder, *overrides]) for name, (strategy, overrides) in EXTRA.items()}
    found |= {
        name: (strategy, [*encoder, f"adapter.method={method}"]) for name, (method, strategy) in CLASSIFIERS.items()
    }
    return found


def train(strategy: str, overrides: list[str], folder: Path) -> list[float]:
    """The losses of one run, step by step."""
    shutil.rmtree(folder, ignore_errors=True)
    launcher = [sys.executable]
    if strategy != "single":
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    command = [*launcher, str(ROOT / "launch" / "train.py"), *overrides, f"output_dir={folder}",
               *DISTRIBUTED.get(strategy, ["engine.name=single"])]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
