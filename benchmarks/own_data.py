"""Time and memory of tokenising and of reading an own file: what a rank holds above its model.

    python benchmarks/own_data.py --model models/smollm2-135m --rows 2000000

Rows are generated; the first process encodes them, a second one finds them encoded, as the other ranks do, and takes
batches of 128 from all over the file.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS = ["the", "sum", "of", "twelve", "and", "thirty", "four", "is", "forty", "six", "because", "ten", "more", "than"]


def write_rows(path: Path, rows: int, chat: bool) -> None:
    rng = np.random.default_rng(0)
    words = np.array(WORDS)
    with path.open("w") as file:
        for number in range(rows):
            chosen = words[rng.integers(0, len(words), 24)].tolist()
            asked, said = f"{number}: {' '.join(chosen[:8])}?", " ".join(chosen[8:])
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            row = {"messages": turns} if chat else {"prompt": asked, "completion": said}
            file.write(json.dumps(row) + "\n")


def measure(path: Path, model: str, fill: bool, results: multiprocessing.Queue) -> None:
    from transformers import AutoTokenizer

    from neuroada.config.data import Data
    from neuroada.data import prepare
    from neuroada.objectives.micro_batch import collate_sequences

    tokenizer = AutoTokenizer.from_pretrained(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    data = Data.model_validate({"datasets": [{"path": str(path)}]})
    prepared = prepare(data, tokenizer, 512, seed=0, cache_dir=path.parent / "cache", fill=fill)
    ready = time.perf_counter() - start
    for step in range(200):
        for item in prepared.train.batch(step, 128):
            collate_sequences(prepared.train.sequences(int(item)), True, 0)
    seconds = time.perf_counter() - start - ready
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    results.put((ready, seconds / 200, above, int(prepared.train.lengths.sum())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--format", choices=["chat", "prompt_completion"], default="chat")
    parser.add_argument("--fill", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.jsonl"
        write_rows(path, args.rows, args.format == "chat")
        print(f"{args.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB of JSONL")
        for name in ("encodes", "finds them encoded"):
            results = context.Queue()
            process = context.Process(target=measure, args=(path, args.model, args.fill, results))
            process.start()
            ready, step, above, tokens = results.get()
            process.join()
            print(
                f"{name}: ready after {ready:.1f} s, {above:.2f} GiB above the tokenizer, "
                f"{1000 * step:.1f} ms a batch of 128 items; {tokens:,} tokens"
            )


if __name__ == "__main__":
    main()
