"""Filling a budget of tokens with whole sequences."""

from __future__ import annotations

import numpy as np

WINDOW = 8192
"""Units packed together: the packing of a stream's beginning does not depend on what follows."""


def fill(lengths: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit-decreasing packing of units of `lengths` tokens into items of at most `budget`.

    Returns (offsets [items + 1] int64, units [units] int64): item i holds units[offsets[i] : offsets[i + 1]]. A unit
    longer than the budget is an item of its own.
    """
    offsets, order = [np.zeros(1, np.int64)], []
    for start in range(0, len(lengths), WINDOW):
        items = _fill_window(lengths[start : start + WINDOW], budget)
        order += [start + np.array(item, dtype=np.int64) for item in items]
        offsets.append(offsets[-1][-1] + np.cumsum([len(item) for item in items]))
    return np.concatenate(offsets), np.concatenate(order) if order else np.zeros(0, np.int64)


def _fill_window(lengths: np.ndarray, budget: int) -> list[list[int]]:
    items: list[list[int]] = []
    by_free: list[list[int]] = [[] for _ in range(budget + 1)]  # free tokens -> items
    some_free = 0  # bit f is set where by_free[f] is not empty
    for unit in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[unit])
        fitting = some_free >> length
        if fitting and length <= budget:
            free = length + (fitting & -fitting).bit_length() - 1
            item = by_free[free].pop()
            if not by_free[free]:
                some_free &= ~(1 << free)
            items[item].append(unit)
        else:
            free, item = budget, len(items)
            items.append([unit])
        left = max(free - length, 0)
        by_free[left].append(item)
        some_free |= 1 << left
    # Earliest unit first, so that a data set that is in order stays so.
    return sorted((sorted(item) for item in items), key=lambda item: item[0])
