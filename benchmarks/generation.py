"""Examples per second of batched greedy generation against a one-by-one `model.generate` loop.

    python benchmarks/generation.py --model models/smollm2-135m --data-dir data

The one-by-one loop is timed on every `--every`-th prompt, spread between repeated batched runs so that a machine that
is busy elsewhere disturbs both alike. The tokens must agree.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroada.evaluation.generate import generate, plan_batches, stop_tokens
from neuroada.tasks.data import load_examples
from neuroada.tasks.encode import encode_prompts
from neuroada.tasks.table import get_task


def one_by_one(model, prompts: Sequence[list[int]], new: int, stop_ids: set[int]) -> list[list[int]]:
    """Transformers' own loop, one prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        answer = out[0, len(prompt) :].tolist()
        answers.append(answer[:-1] if answer[-1] in stop_ids else answer)
    return answers


def batched(model, prompts: Sequence[list[int]], new: int, stop_ids: set[int], tokens: int) -> list[list[int]]:
    """This project's, as launch/evaluate.py runs it."""
    answers: dict[int, list[int]] = {}
    for batch in plan_batches([len(prompt) for prompt in prompts], new, tokens):
        found = generate(model, [prompts[i] for i in batch.indices], new, stop_ids, batch.rows)
        answers.update(zip(batch.indices, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--task", default="AddSub")
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--every", type=int, default=4, help="the one-by-one loop takes every so-many-th prompt")
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()

    task = get_task(arguments.task)
    examples = load_examples(task, "test", arguments.data_dir)[: arguments.examples]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = encode_prompts([task.prompt(example) for example in examples], tokenizer)
    stop_ids = stop_tokens(model, tokenizer)
    new = arguments.new_tokens
    generate(model, prompts[:2], 4, stop_ids, 2)  # warm up

    sample = prompts[:: arguments.every]
    seconds = {"one by one": 0.0, "batched": 0.0}
    equal = 0
    for turn in range(arguments.repeat):
        start = time.perf_counter()
        alone = one_by_one(model, sample[turn :: arguments.repeat], new, stop_ids)
        seconds["one by one"] += time.perf_counter() - start
        start = time.perf_counter()
        together = batched(model, prompts, new, stop_ids, arguments.batch_tokens)
        seconds["batched"] += time.perf_counter() - start
        equal += sum(a == b for a, b in zip(alone, together[:: arguments.every][turn :: arguments.repeat], strict=True))

    rates = {
        "one by one": len(sample) / seconds["one by one"],
        "batched": arguments.repeat * len(prompts) / seconds["batched"],
    }
    lengths = sorted(map(len, together))
    print(f"{task.name}: {len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens,")
    print(f"answers of {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]}), fp32, ", end="")
    print(f"{model.device}, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        print(f"{name:<11} {rate:6.2f} examples/s")
    print(f"ratio       {rates['batched'] / rates['one by one']:6.2f}")
    print(f"equal answers: {equal} of {len(sample)}")


if __name__ == "__main__":
    main()
