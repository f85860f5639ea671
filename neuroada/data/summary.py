"""What the data of a run come to, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from neuroada.data.encoding import Tokens
from neuroada.data.preparation import Prepared

_SAMPLED_BATCHES = 64


@dataclass(frozen=True)
class Summary:
    """Of the training data of a run. Lengths are in tokens."""

    sources: list[dict[str, Any]]  # path, format, rows, examples, dropped, skipped, ... of each
    sequences: int
    tokens: int
    learnt: int  # tokens that carry a loss
    p50: int
    p95: int
    longest: int
    items: int  # what an epoch counts: sequences, pairs, or filled budgets
    held_out: int  # sequences of the validation set
    padding: float  # of the tokens a padded run would compute, the part that is padding; saved by packing

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(prepared: Prepared, paths: list[str], batch_size: int, micro_batch_size: int) -> Summary:
    """paths: of data.datasets. Padding is that of micro batches of like length, over the first steps."""
    train = prepared.train
    lengths = _sequence_lengths(prepared)
    sources = []
    for path, store in zip(paths, prepared.stores, strict=False):
        sources.append({"path": path, "sequences": len(store.rows), **asdict(store.facts)})
    return Summary(
        sources=sources,
        sequences=len(lengths),
        tokens=int(train.lengths.sum()),
        learnt=int(train.num_answer_tokens.sum()),
        p50=int(np.percentile(lengths, 50)),
        p95=int(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        items=len(train),
        held_out=sum(len(part.members) for part in prepared.validation.parts) if prepared.validation else 0,
        padding=_padding(lengths, batch_size, micro_batch_size),
    )


def runs_of_text(tokens: Tokens, tokenizer: Any) -> list[tuple[str, bool]]:
    """A sequence as pieces of text, with whether each is learnt."""
    pieces, start = [], 0
    for learnt, run in groupby(tokens.learnt.tolist()):
        end = start + len(list(run))
        pieces.append((tokenizer.decode(tokens.ids[start:end].tolist()), bool(learnt)))
        start = end
    return pieces


def _sequence_lengths(prepared: Prepared) -> np.ndarray:
    """[sequences] int64 of the training data."""
    found = []
    for part in prepared.train.parts:
        each = np.diff(part.store.offsets).reshape(-1, part.store.facts.unit)
        found.append(each[part.members].ravel())
    return np.concatenate(found)


def _padding(lengths: np.ndarray, batch_size: int, micro: int) -> float:
    rng = np.random.default_rng(0)
    real = padded = 0
    for _ in range(_SAMPLED_BATCHES):
        batch = np.sort(rng.choice(lengths, size=min(batch_size, len(lengths)), replace=False))
        for start in range(0, len(batch), micro):
            part = batch[start : start + micro]
            real += int(part.sum())
            padded += int(part.max()) * len(part)
    return 1 - real / padded
