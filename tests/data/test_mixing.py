"""The order of training, as a function of seed and step; packing; micro batches as tensors."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from neuroada.data.encoding import Tokens
from neuroada.data.mixing import Order
from neuroada.data.packing import fill
from neuroada.objectives.micro_batch import collate_sequences


def stream(order, start, steps, size):
    return np.concatenate([order.batch(step, size) for step in range(start, start + steps)])


def test_concatenated_every_item_once_an_epoch():
    order = Order((10, 30), seed=1)
    items = stream(order, 0, 20, 4)
    assert sorted(items[:40]) == sorted(items[40:]) == list(range(40))
    assert items[:40].tolist() != items[40:].tolist()


@pytest.mark.parametrize(
    "order", [Order((10, 30, 5), 1), Order((10, 30, 5), 1, (5, 3, 2)), Order((10, 30), 1, block=8)]
)
def test_a_step_depends_on_nothing_before_it(order):
    whole = stream(order, 0, 50, 6)
    again = Order(order.sizes, order.seed, order.weights, order.block)
    assert again.batch(37, 6).tolist() == whole[37 * 6 : 38 * 6].tolist()
    # Nor on how the stream is cut into steps.
    assert stream(again, 0, 25, 12).tolist() == whole.tolist()


def test_weights_hold_in_any_stretch():
    order = Order((1000, 10), seed=0, weights=(0.7, 0.3))
    items = stream(order, 0, 512, 16)
    second = (items >= 1000).reshape(-1, 1024).sum(1)
    assert set(second) <= {307, 308}
    # A source that ends begins again: each of its items as often, within one.
    counts = np.bincount(items[items >= 1000] - 1000)
    assert counts.max() - counts.min() <= 1
    seen = items[items < 1000][:1000]
    assert len(set(seen)) == 1000


def test_blocks_shuffle_within_themselves():
    short, longer = Order((32,), 0, block=16), Order((96,), 0, block=16)
    assert stream(short, 0, 8, 4).tolist() == stream(longer, 0, 8, 4).tolist()
    assert sorted(stream(longer, 4, 4, 4)) == list(range(16, 32))


@pytest.mark.parametrize("budget", [64, 100, 512])
def test_fill(budget):
    lengths = np.random.default_rng(0).integers(1, 65, 20_000)
    offsets, units = fill(lengths, budget)
    sums = np.add.reduceat(lengths[units], offsets[:-1])
    assert sorted(units) == list(range(20_000))
    assert sums.max() <= budget
    assert sums.sum() / (budget * len(sums)) > 0.97
    beginning, _ = fill(lengths[:8192], budget)
    assert offsets[: len(beginning)].tolist() == beginning.tolist()


def test_fill_puts_what_is_longer_alone():
    offsets, units = fill(np.array([5, 20, 3]), 8)
    assert [units[a:b].tolist() for a, b in pairwise(offsets)] == [[0, 2], [1]]


def some_sequences():
    rng = np.random.default_rng(0)
    found = []
    for length in (5, 9, 2):
        learnt = rng.random(length) < 0.5
        learnt[0], learnt[-1] = False, True
        found.append(Tokens(rng.integers(0, 50, length).astype(np.int32), learnt))
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_targets_stand_where_their_token_is_predicted(packed):
    sequences = some_sequences()
    batch = collate_sequences(sequences, packed, pad_id=0)
    ids, keep = batch.inputs["input_ids"], batch.inputs["logits_to_keep"]
    assert ids.shape == ((1, 16) if packed else (3, 9)) and batch.tokens == 16
    assert (batch.targets != -100).sum() == sum(int(one.learnt.sum()) for one in sequences)
    for row in range(len(ids)):
        for column, (place, target) in enumerate(zip(keep.tolist(), batch.targets[row].tolist(), strict=True)):
            if target != -100:
                assert ids[row, place + 1] == target
                assert packed or batch.sequence[row, column] == row
    found = [batch.targets[(batch.sequence == n) & (batch.targets != -100)].tolist() for n in range(3)]
    assert found == [one.ids[one.learnt].tolist() for one in sequences]
    if packed:
        assert (batch.inputs["position_ids"] == 0).sum() == 3
    assert isinstance(batch.targets, torch.Tensor)
