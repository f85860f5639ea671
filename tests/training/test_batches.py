import numpy as np
import pytest
import torch

from neuroada.data.mixing import Order
from neuroada.objectives.micro_batch import collate
from neuroada.training.sample_order import share


class Sequences:
    """Lengths 3 to 12, answers of 2 tokens; token ids say where they stand."""

    def __init__(self, n: int) -> None:
        self.lengths = np.array([3 + i * 7 % 10 for i in range(n)])
        self.num_answer_tokens = np.full(n, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> np.ndarray:
        return 100 * (i + 1) + np.arange(self.lengths[i])

    def answer_start(self, i: int) -> int:
        return int(self.lengths[i]) - 2


def test_every_epoch_sees_every_example_once_across_batches() -> None:
    stream = np.concatenate([Order((10,), seed=1).batch(step, 4) for step in range(5)])  # two epochs of 10
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:])
    assert list(Order((10,), seed=1).batch(3, 4)) == list(stream[12:16])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_ranks_share_a_batch_without_loss_or_repetition(ranks: int, micro: int) -> None:
    data = Sequences(40)
    batch = Order((40,), seed=0).batch(0, 12)
    shares = [np.concatenate(list(share(batch, data.lengths, rank, ranks, micro))) for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    tokens = [data.lengths[mine].sum() for mine in shares]
    assert max(tokens) - min(tokens) <= 10  # dealt by length: no more than a longest sequence apart


@pytest.mark.parametrize("packing", [True, False])
def test_labels_stand_where_their_token_is_predicted(packing: bool) -> None:
    data = Sequences(4)
    batch = collate(data, np.array([2, 0, 1]), packing, pad_id=0)
    ids, keep = batch.inputs["input_ids"], batch.inputs["logits_to_keep"]
    assert batch.tokens == data.lengths[:3].sum()
    assert (batch.targets != -100).sum() == 3 * 2
    for row in range(len(ids)):
        for column, target in zip(keep.tolist(), batch.targets[row].tolist(), strict=True):
            if target != -100:
                assert ids[row, column + 1] == target
    if packing:
        assert ids.shape == (1, batch.tokens)
        starts = (batch.inputs["position_ids"][0] == 0).nonzero().flatten()
        assert ids[0, starts].tolist() == [300, 100, 200]
    else:
        assert batch.inputs["attention_mask"].sum(1).tolist() == data.lengths[[2, 0, 1]].tolist()


def test_padding_is_masked_by_position_even_where_eos_is_the_pad_token() -> None:
    class EosIsPad(Sequences):
        def tokens(self, i: int) -> np.ndarray:
            return np.append(super().tokens(i)[:-1], 0)  # ends in EOS, id 0

    data = EosIsPad(3)
    batch = collate(data, np.arange(3), packing=False, pad_id=0)
    assert (batch.targets == 0).sum() == 3  # each sequence learns its own EOS, no padding
    assert isinstance(batch.targets, torch.Tensor)
