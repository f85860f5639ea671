"""Problems that need no download: sums of a few numbers of two digits, made by reasoning-gym from a seed."""

import functools
import re
from collections.abc import Iterator
from typing import Any

from neuroada.errors import UserError

TRAIN_SIZE, TEST_SIZE = 20_000, 200
TRAIN_SEED, TEST_SEED = 0, 1_000_000_000  # reasoning-gym draws item i from seed + i: near seeds would share items


@functools.cache
def generate(split: str, max_terms: int = 3) -> tuple[dict[str, str], ...]:
    """The examples of `split`, train (20,000) or test (200), with 2 to `max_terms` numbers: the same on every machine.

    The test problems are distinct, and no training problem has a test problem's numbers in its order, whatever the
    signs between them: "12 + 34" in the test keeps "12 - 34" out of training too.
    """
    if split not in ("train", "test"):
        raise UserError(f"generated arithmetic: there is no split {split!r}; splits: train, test")
    tested: dict[tuple[str, ...], dict[str, str]] = {}
    for problem in _problems(TEST_SEED, max_terms):
        tested.setdefault(_numbers(problem), problem)
        if len(tested) == TEST_SIZE:
            break
    if split == "test":
        return tuple(tested.values())
    fresh = (problem for problem in _problems(TRAIN_SEED, max_terms) if _numbers(problem) not in tested)
    return tuple(problem for problem, _ in zip(fresh, range(TRAIN_SIZE), strict=False))


def _problems(seed: int, max_terms: int) -> Iterator[dict[str, str]]:
    import reasoning_gym  # here: it takes more than a second

    made: Any = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=max_terms, min_digits=2, max_digits=2, seed=seed, size=2 * TRAIN_SIZE
    )
    for item in made:
        yield {"instruction": item["question"], "input": "", "output": item["answer"], "answer": item["answer"]}


def _numbers(problem: dict[str, str]) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", problem["instruction"]))
