"""From the `data:` section to what a run learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroada.config.data import Data
from neuroada.data.dataset import TokenData, hold_out, make_parts
from neuroada.data.encode_source import SourceEncoder, digest
from neuroada.data.mixing import Order, shares
from neuroada.data.storage import Facts, Store
from neuroada.errors import UserError

STREAM_BLOCK = 8192
"""Units of a stream that are shuffled among themselves, and read at once."""


@dataclass(frozen=True)
class Prepared:
    """What a run learns from, the same on every rank."""

    train: TokenData
    validation: TokenData | None
    stores: list[Store]
    """Of the training sources, in the order of data.datasets."""
    fingerprint: str
    """Of everything that decides the tokens and their order, the seed aside."""
    pairs: bool
    """Whether the units are preference pairs."""


def prepare(
    data: Data,
    tokenizer: Any,
    max_length: int,
    seed: int,
    cache_dir: Path,
    fill: bool = False,
    needed: int | None = None,
) -> Prepared:
    """Encode all sources, or find them encoded. UserError naming file, row and key where a row is wrong.

    fill: whether an item is filled with as many units as max_length tokens hold. needed: of data.streaming, the units
    that the run's steps take from all sources together.
    """
    encode = SourceEncoder(data, tokenizer, max_length, cache_dir)
    found = _streams(data, encode, needed) if data.streaming else [encode(spec) for spec in data.datasets]
    stores, identities = [store for store, _ in found], [identity for _, identity in found]
    pairs = _check_formats(data, stores)
    for store, spec in zip(stores, data.datasets, strict=False):
        if not len(store):
            raise UserError(f"data.datasets: {spec.path}: nothing is left to learn from ({_lost(store.facts)})")
    budget = max_length if fill else None
    used: list[np.ndarray | None] = [None] * len(stores)
    validation = None
    if data.validation.own_source:
        validation = _own_validation(data, encode)
    elif data.validation.size:
        used, validation = _held_out(data, stores, seed)
    parts = make_parts(stores, used, budget)
    for part, spec in zip(parts, data.datasets, strict=False):
        if not len(part):
            raise UserError(f"data.datasets: {spec.path}: all of it is held out; lower data.validation.size")
    weights = tuple(spec.weight or 1.0 for spec in data.datasets) if data.mix == "interleave" else None
    order = Order(tuple(map(len, parts)), seed, weights, STREAM_BLOCK if data.streaming else None)
    decided = [identities, weights, fill, data.validation.size if validation else 0]
    return Prepared(TokenData(parts, order), validation, stores, digest(decided), pairs)


def _streams(data: Data, encode: SourceEncoder, needed: int | None) -> list[tuple[Store, str]]:
    """As much of each source as `needed` units of training take, in whole blocks: a longer run begins with the same."""
    if needed is None:
        raise UserError("data.streaming: a stream has no known end; set train.max_steps")
    if data.mix == "interleave":
        parts = shares(needed, tuple(spec.weight or 1.0 for spec in data.datasets))
        return [encode(spec, _blocks(int(part) + 1)) for spec, part in zip(data.datasets, parts, strict=True)]
    found: list[tuple[Store, str]] = []
    for spec in data.datasets:
        missing = needed - sum(len(store) for store, _ in found)
        if missing > 0:
            found.append(encode(spec, _blocks(missing)))
    return found


def _blocks(units: int) -> int:
    return math.ceil(units / STREAM_BLOCK) * STREAM_BLOCK


def _check_formats(data: Data, stores: list[Store]) -> bool:
    """Whether the sources are preference pairs. UserError where only some are, or a setting has no meaning for them."""
    formats = [store.facts.format for store in stores]
    pairs = [name == "preference" for name in formats]
    if any(pairs) and not all(pairs):
        raise UserError(
            f"data.datasets: {data.datasets[pairs.index(True)].path} holds preference pairs, "
            f"{data.datasets[pairs.index(False)].path} is {formats[pairs.index(False)]}; train on them separately"
        )
    if pairs[0] and data.train_on == "all":
        raise UserError("data.train_on = all: of a preference pair the answers are compared; choose assistant")
    if pairs[0] and data.excess_length == "split":
        raise UserError("data.excess_length = split: a preference pair cannot be divided; choose drop or truncate")
    return pairs[0]


def _own_validation(data: Data, encode: SourceEncoder) -> TokenData:
    first, wanted = data.datasets[0], data.validation
    spec = first.model_copy(
        update={
            "path": wanted.path or first.path,
            "split": wanted.split or "train",
            "revision": first.revision if wanted.path is None else None,
            "name": first.name if wanted.path is None else None,
            "weight": None,
        }
    )
    store, _ = encode(spec)
    units = np.arange(len(store))[: wanted.size or None]
    if not len(units):
        raise UserError(f"data.validation: {spec.path}: no example is left ({_lost(store.facts)})")
    return _in_order(make_parts([store], [units], None))


def _held_out(data: Data, stores: list[Store], seed: int) -> tuple[list[np.ndarray | None], TokenData]:
    rows = sum(len(np.unique(store.unit_rows)) for store in stores)
    if data.validation.size > rows // 2:
        raise UserError(
            f"data.validation.size = {data.validation.size}: more than half of the {rows:,} examples; choose fewer"
        )
    train, held = hold_out(stores, data.validation.size, seed)
    return list(train), _in_order(make_parts(stores, held, None))


def _in_order(parts: list) -> TokenData:
    return TokenData(parts, Order(tuple(map(len, parts)), seed=0))


def _lost(facts: Facts) -> str:
    reasons = [f"{count:,} {reason}" for reason, count in facts.dropped.items()]
    reasons += [f"{facts.skipped:,} bad rows, the first: {facts.skipped_rows[0]}"] if facts.skipped else []
    return f"{facts.rows:,} rows read; " + ("; ".join(reasons))
