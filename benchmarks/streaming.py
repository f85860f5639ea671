"""Selection and merge on a checkpoint of LLaMA-7B's shapes: peak memory, and time against reading and copying it.

    python benchmarks/streaming.py --folder /big/disk                       # 13.5 GB; needs 30 GB free
    python benchmarks/streaming.py --folder /tmp --layers 2 --shard-gb 0.5  # 1.3 GB

Every command runs in a fresh process over files that were dropped from the page cache. What it writes is deleted. On a
shared machine trust the CPU seconds and the memory before the wall clock.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 24  # bytes


@dataclass
class Measured:
    seconds: float  # wall clock
    cpu: float  # CPU seconds, of all its processes
    peak: float = 0.0  # GB of resident memory, of its largest process


def generate(folder: Path, layers: int, shard_bytes: float) -> int:
    """A Hugging Face folder of bf16 weights, N(0, 0.02): one random block, shifted from repeat to repeat."""
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")  # the defaults are LLaMA-7B's sizes
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * size.numel() for size in shards[-1].values()) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    block = (torch.randn(CHUNK // 2 + 997) * 0.02).to(torch.bfloat16).view(torch.uint8)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * shape.numel()]}
            at += 2 * shape.numel()
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, at, CHUNK):
                shift = 2 * (start // CHUNK % 997)
                out.write(memoryview(block.numpy())[shift : shift + min(CHUNK, at - start)])  # type: ignore[arg-type]
            out.flush()
            os.fsync(out.fileno())
        weight_map |= dict.fromkeys(shard, file)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make_adapter(folder: Path, selection: Path, k: int) -> None:
    """An adapter with the selection's connections and random deltas."""
    tensors = {}
    for name, idx in load_file(selection).items():
        module = "base_model.model." + name.removesuffix(".idx")
        tensors[f"{module}.neuroada_idx"] = idx
        tensors[f"{module}.neuroada_delta"] = 0.01 * torch.randn(len(idx), k)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with safe_open(selection, framework="pt") as opened:
        config = {"peft_type": "NEUROADA", "k": k, "base_fingerprint": opened.metadata()["base_fingerprint"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path, target: Path | None = None) -> Measured:
    """Read the weights; write them to `target` and through to the disk, if there is one."""
    drop_from_cache(folder)
    buffer, started, cpu = bytearray(CHUNK), time.monotonic(), time.process_time()
    for path in sorted(folder.glob("*.safetensors")):
        copy = target / path.name if target else Path(os.devnull)
        with path.open("rb", buffering=0) as file, copy.open("wb") as out:
            while count := file.readinto(buffer):
                if target:
                    out.write(memoryview(buffer)[:count])
            if target:
                out.flush()
                os.fsync(out.fileno())
    return Measured(time.monotonic() - started, time.process_time() - cpu)


def run(folder: Path, *argv: str) -> Measured:
    """A command in a fresh process. Its seconds are those it reports: without starting Python and importing torch."""
    drop_from_cache(folder)
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(argv)} failed")
    seconds = json.loads(output)["seconds"] if output else time.monotonic() - started
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the temporary files go")
    parser.add_argument("--layers", type=int, default=32, help="LLaMA-7B has 32")
    parser.add_argument("--shard-gb", type=float, default=4.9)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="streaming-", dir=args.folder))
    try:
        compare(room, generate(room / "base", args.layers, args.shard_gb * 1e9) / 1e9, args.k)
    finally:
        shutil.rmtree(room)


def compare(room: Path, size: float, k: int) -> None:
    """Print the table for the checkpoint `room`/base of `size` GB."""
    base, merged, selection = room / "base", room / "merged", room / "selection.safetensors"
    print(f"{size:.2f} GB of weights, k = {k}, {os.cpu_count()} cores\n")
    print("| | s | GB/s | against | CPU s | peak RSS GB |\n| --- | --- | --- | --- | --- | --- |")

    def row(name: str, done: Measured, plain: Measured | None = None) -> None:
        against = f"{done.seconds / plain.seconds:.2f}" if plain else ""
        peak = f"{done.peak:.2f}" if done.peak else ""
        speed = f"{done.seconds:.1f} | {size / done.seconds:.2f} | {against}"
        print(f"| {name} | {speed} | {done.cpu:.1f} | {peak} |", flush=True)

    row("only importing", run(base, "-c", "import neuroada.offline.merge"))
    for workers in sorted({1, os.cpu_count() or 1}):
        selection.unlink(missing_ok=True)
        reading = read(base)
        row("reading", reading)
        argv = ("--model", str(base), "--k", str(k), "--out", str(selection), "--workers", str(workers), "--json")
        row(f"select.py --workers {workers}", run(base, "launch/select.py", *argv), reading)
    (room / "copy").mkdir()
    copying = read(base, room / "copy")
    row("copying", copying)
    shutil.rmtree(room / "copy")
    make_adapter(room / "adapter", selection, k)
    argv = ("--adapter", str(room / "adapter"), "--base-model", str(base), "--out", str(merged), "--json")
    row("merge.py", run(base, "launch/merge.py", *argv), copying)
    shutil.rmtree(base)
    argv = ("--unmerge", "--model", str(merged), "--out", str(base), "--json")
    row("merge.py --unmerge", run(merged, "launch/merge.py", *argv), copying)


if __name__ == "__main__":
    main()
