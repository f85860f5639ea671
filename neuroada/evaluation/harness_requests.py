"""The requests of lm-evaluation-harness, answered by several ranks.

The library runs on rank 0 alone, and its model hands each rank a share of what is asked. The library's own division
gives every rank some of the questions: each then draws few-shot examples of its own from the same seed, so that the
score depends on the number of ranks, and on two nodes the ranks share numbers. Here the requests are made once.
"""

from collections.abc import Callable, Sequence
from typing import Any

from neuroada.evaluation.ranks import Ranks

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""What the library asks of a model: the names of its methods, each from a list of requests to a list of answers."""


def divide(model: Any, ranks: Ranks) -> None:
    """Let `model`, the library's on rank 0, have its requests answered by all ranks, which are in `serve` meanwhile."""
    for kind in KINDS:
        setattr(model, kind, _divided(model, kind, ranks))


def serve(model: Any, ranks: Ranks) -> None:
    """Answer what rank 0 asks, by this rank's `model`, until it sends None."""
    while (asked := ranks.scatter()) is not None:
        ranks.gather(_answers(getattr(model, asked[0]), *asked, disable_tqdm=True))


def _divided(model: Any, kind: str, ranks: Ranks) -> Callable[..., list[Any]]:
    alone = getattr(model, kind)

    def answer(requests: Sequence[Any], **how: Any) -> list[Any]:
        shares = deal([request.args for request in requests], ranks.world_size)
        asked = ranks.scatter([(kind, [requests[i].args for i in share]) for share in shares])
        answers: dict[int, Any] = {}
        for share, found in zip(shares, ranks.gather(_answers(alone, *asked, **how)), strict=True):
            answers.update(zip(share, found, strict=True))
        return [answers[i] for i in range(len(requests))]

    return answer


def _answers(answer: Callable[..., list[Any]], kind: str, arguments: Sequence[tuple[Any, ...]], **how: Any) -> list:
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
    return answer(requests, **how) if requests else []


def deal(arguments: Sequence[tuple[Any, ...]], world_size: int) -> list[list[int]]:
    """The positions of the requests that each rank answers.

    Those of one context stay together, since the library computes it once for several short answers; the contexts are
    dealt by their length, so that the shares take about as long.
    """
    of_context: dict[str, list[int]] = {}
    for i, one in enumerate(arguments):
        of_context.setdefault(one[0], []).append(i)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for number, context in enumerate(sorted(of_context, key=len, reverse=True)):
        shares[number % world_size] += of_context[context]
    return shares
