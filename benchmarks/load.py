"""Host memory while the model is loaded, sharded: the highest resident memory of each rank, less what it held before.

    python benchmarks/load.py --ranks 4 --hidden 1024 --layers 16     # a 0.6 GB Llama in files of 100 MB

Counted is anonymous memory (RssAnon): pages of the mapped checkpoint files belong to the system's cache, all ranks
share them, and they are dropped when memory is short. Blocks of 64 KB and more are returned to the system when freed,
so that the heap's holes do not count. A rank that held the whole model would show at least 1.0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ENGINES = {
    "ZeRO-2": ["engine.name=deepspeed", "engine.ds_config=zero2"],
    "ZeRO-3": ["engine.name=deepspeed", "engine.ds_config=zero3"],
    "FSDP2": ["engine.name=fsdp2"],
}


def anonymous() -> int:
    """This process's resident memory that no file backs, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The highest `anonymous()` while the block runs, looked at every 5 ms."""

    def __enter__(self) -> "Peak":
        self.before = self.bytes = anonymous()
        self.running = True
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.after = anonymous()


def rank(model: str, overrides: list[str], out: str) -> None:
    import peft  # noqa: F401  its import is not the model's memory
    import torch

    from neuroada.config.recipe import load_recipe
    from neuroada.engines import make_engine
    from neuroada.training.builder import RecipeModelBuilder

    recipe = load_recipe("tiny_arithmetic", [f"model={model}", *overrides])
    engine = make_engine(recipe)
    engine.reduce(torch.zeros(1))
    with Peak() as peak:
        model = engine.load(RecipeModelBuilder.of(recipe))
    Path(out, f"{engine.rank}.json").write_text(json.dumps([peak.bytes - peak.before, peak.after - peak.before]))
    engine.reduce(torch.zeros(1))
    del model
    os._exit(0)


def build(folder: Path, hidden: int, layers: int) -> int:
    """Write a random Llama in shards of 100 MB; its size in bytes."""
    from neuroada.sources.tiny import make_tiny

    make_tiny(folder, hidden=hidden, layers=layers)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        size = build(Path(scratch, "model"), args.hidden, args.layers)
        print(f"a Llama of {size / 1e6:,.0f} MB in fp32; memory of loading it, as a part of that\n")
        print("| engine | ranks | peak, rank 0 | peak, fullest other | peak, all ranks | kept, fullest rank |")
        print("| --- | --- | --- | --- | --- | --- |")
        for engine, overrides in ENGINES.items():
            for ranks in args.ranks:
                found = measure(Path(scratch), overrides, ranks)
                peaks, kept = [peak / size for peak, _ in found], max(after / size for _, after in found)
                print(f"| {engine} | {ranks} | {peaks[0]:.2f} | {max(peaks[1:]):.2f} | {sum(peaks):.2f} | {kept:.2f} |",
                      flush=True)  # fmt: skip


def measure(scratch: Path, overrides: list[str], ranks: int) -> list[list[int]]:
    """[peak, kept] of each rank, in bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", __file__,
               "--rank", str(scratch / "model"), str(scratch), *overrides]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1",
                   "MALLOC_MMAP_THRESHOLD_": "65536"}  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [json.loads((scratch / f"{number}.json").read_text()) for number in range(ranks)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], sys.argv[4:], sys.argv[3])
    else:
        main()
