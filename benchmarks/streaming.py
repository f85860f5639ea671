"""Selection and merge on a checkpoint of LLaMA-7B's shapes: peak memory, and time against reading and copying it.

    python benchmarks/streaming.py --folder /big/disk                       # 13.5 GB; needs 30 GB free
    python benchmarks/streaming.py --folder /tmp --layers 2 --shard-gb 0.5  # 1.3 GB

Every command runs in a fresh process over files that were dropped from the page cache. What it writes is deleted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 24  # bytes


def generate(folder: Path, layers: int, shard_bytes: float) -> int:
    """A Hugging Face folder of bf16 weights, N(0, 0.02): one random block, repeated with its sign and shift changed."""
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


def read(folder: Path, target: Path | None = None) -> float:
    """Seconds to read the weights, and to write them to `target` and to the disk itself."""
    drop_from_cache(folder)
    buffer, started = bytearray(CHUNK), time.monotonic()
    for path in sorted(folder.glob("*.safetensors")):
        with (
            path.open("rb", buffering=0) as file,
            (target / path.name if target else Path("/dev/null")).open("wb") as out,
        ):
            while count := file.readinto(buffer):
                if target:
                    out.write(memoryview(buffer)[:count])
            if target:
                out.flush()
                os.fsync(out.fileno())
    return time.monotonic() - started


def run(folder: Path, *argv: str) -> tuple[float, float, float]:
    """(seconds of the command's own work, seconds of its whole process, peak RSS of its largest process in GB)."""
    drop_from_cache(folder)
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(argv)} failed")
    work = json.loads(output)["seconds"] if output else 0.0
    return work, time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the temporary files go")
    parser.add_argument("--layers", type=int, default=32, help="LLaMA-7B has 32")
    parser.add_argument("--shard-gb", type=float, default=4.9)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="streaming-", dir=args.folder))
    try:
        base, k = room / "base", str(args.k)
        started = time.monotonic()
        size = generate(base, args.layers, args.shard_gb * 1e9)
        print(f"{size / 1e9:.2f} GB of weights in {time.monotonic() - started:.0f} s; k = {k}\n", flush=True)
        print(
            "| | s | GB/s | ratio | whole process s | peak RSS GB |\n| --- | --- | --- | --- | --- | --- |", flush=True
        )

        def row(name: str, seconds: float, plain: float, process: tuple[float, float] | None = None) -> None:
            whole, peak = (f"{process[0]:.1f}", f"{process[1]:.2f}") if process else ("", "")
            numbers = f"{seconds:.1f} | {size / 1e9 / seconds:.2f} | {seconds / plain:.2f}" if seconds else " | | "
            print(f"| {name} | {numbers} | {whole} | {peak} |", flush=True)

        row("importing alone", 0, 1, run(base, "-c", "import neuroada.adapter.streaming.merge")[1:])
        for workers in sorted({1, os.cpu_count() or 1}):
            reading = read(base)
            row("reading", reading, reading)
            selection = room / f"selection{workers}.safetensors"
            argv = ("--model", str(base), "--k", k, "--out", str(selection), "--workers", str(workers), "--json")
            work, *process = run(base, "launch/select.py", *argv)
            row(f"select, {workers} worker{'s'[: workers > 1]}", work, reading, (process[0], process[1]))
        (room / "copy").mkdir()
        copying = read(base, room / "copy")
        shutil.rmtree(room / "copy")
        row("copying", copying, copying)
        make_adapter(room / "adapter", selection, args.k)
        merging = ("--adapter", str(room / "adapter"), "--base-model", str(base), "--out", str(room / "merged"))
        work, *process = run(base, "launch/merge.py", *merging, "--json")
        row("merge", work, copying, (process[0], process[1]))
        shutil.rmtree(base)
        undo = ("--unmerge", "--model", str(room / "merged"), "--out", str(room / "base"), "--json")
        work, *process = run(room / "merged", "launch/merge.py", *undo)
        row("unmerge", work, copying, (process[0], process[1]))
    finally:
        shutil.rmtree(room)


if __name__ == "__main__":
    main()
