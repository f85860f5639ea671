"""What a comparison runs: the untrained model, each method's learning rates, its seeds at the best; some at a time."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from neuroada.comparison.contenders import Comparison, Contender
from neuroada.config.recipe import Recipe
from neuroada.errors import UserError

WIDENED = 8
"""Further rates that --widen tries at most: some losses fall with every rate, and a search must end."""


class RunOne(Protocol):
    """Makes one run in a process of its own, unless it is there, on a GPU if one is named; its result.json.

    base: the untrained model is measured, nothing trained.
    """

    def __call__(self, recipe: Recipe, *, gpu: str | None, base: bool = False) -> dict[str, Any]: ...


def search(
    untrained: Recipe,
    methods: Sequence[Contender],
    seeds: Sequence[int],
    comparison: Comparison,
    run: RunOne,
    *,
    jobs: int,
    gpus: Sequence[str] = (),
    widen: bool = False,
) -> dict[str, dict[str, Any]]:
    """Each method's label -> {"lr": the best rate, "tries": {rate: the loss it is chosen by; None: it diverged}}.

    untrained: of the model as it is, measured first. jobs: runs at a time, dealt to `gpus` in turn; of one job a
    method is finished before the next begins. The first run that fails ends the search when those under way have ended;
    its error is raised.
    """
    if jobs == 1:
        run(untrained, gpu=None, base=True)
        one_by_one = partial(_run_in_turn, run)
        return {method.label: _of_method(method, seeds, comparison, one_by_one, widen) for method in methods}
    free: SimpleQueue[str | None] = SimpleQueue()
    for job in range(jobs):
        free.put(gpus[job % len(gpus)] if gpus else None)

    def on_a_free_gpu(recipe: Recipe, *, base: bool = False) -> dict[str, Any]:
        gpu = free.get()
        try:
            return run(recipe, gpu=gpu, base=base)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(jobs) as runs, ThreadPoolExecutor(len(methods)) as searches:

        def run_all(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
            return [future.result() for future in [runs.submit(on_a_free_gpu, recipe) for recipe in recipes]]

        measured = runs.submit(on_a_free_gpu, untrained, base=True)
        chosen = {
            method.label: searches.submit(_of_method, method, seeds, comparison, run_all, widen) for method in methods
        }
        try:
            for done in as_completed([measured, *chosen.values()]):
                done.result()
        except BaseException:
            runs.shutdown(wait=False, cancel_futures=True)
            raise
    return {label: done.result() for label, done in chosen.items()}


def _run_in_turn(run: RunOne, recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    return [run(recipe, gpu=None) for recipe in recipes]


def _of_method(
    method: Contender,
    seeds: Sequence[int],
    comparison: Comparison,
    run_all: Callable[[Sequence[Recipe]], list[dict[str, Any]]],
    widen: bool,
) -> dict[str, Any]:
    tries: dict[float, float | None] = {}
    rates: Sequence[float] = method.lrs
    # Where there is no rate to choose, no seed waits for the first.
    at_once = seeds if len(rates) == 1 else seeds[:1]
    while rates:
        results = run_all([method.recipe(comparison, lr, seed) for lr in rates for seed in at_once])
        tries |= {lr: result["validation"] for lr, result in zip(rates, results[:: len(at_once)], strict=True)}
        further = beyond(tries) if widen and len(tries) < len(method.lrs) + WIDENED else None
        rates = [] if further is None else [further]
    best = _best(tries)
    if tries[best] is None:
        raise UserError(f"--methods {method.label}: diverged at every learning rate of {list(tries)}; try lower ones")
    run_all([method.recipe(comparison, best, seed) for seed in seeds[len(at_once) :]])
    return {"lr": best, "tries": {f"{lr:g}": tries[lr] for lr in sorted(tries)}}


def beyond(tries: dict[float, float | None]) -> float | None:
    """The next rate on the side where the best is the last one tried; None where it is between others.

    tries: rate -> loss, None where it diverged. A single rate has no side. The next one is rounded to one digit, unless
    that would lead back: rates may lie close together.
    """
    rates, best = sorted(tries), _best(tries)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    if tries[best] is None:  # every one diverged
        best = rates[0]
    neighbour = rates[1] if best == rates[0] else rates[-2]
    further = best * best / neighbour
    rounded = float(f"{further:.1g}")
    return rounded if (rounded > best) == (further > best) and rounded != best else further


def _best(tries: dict[float, float | None]) -> float:
    return min(tries, key=lambda lr: math.inf if (loss := tries[lr]) is None else loss)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; [] without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch  # seconds, which a wrong argument need not wait for

        return [str(number) for number in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name]
