"""Indices survive the trip through their uint8 bytes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroada.ops import MAX_IN_FEATURES, pack_indices, unpack_indices


@given(st.lists(st.lists(st.integers(0, MAX_IN_FEATURES - 1), min_size=3, max_size=3), min_size=1, max_size=5))
def test_round_trip(rows):
    idx = torch.tensor(rows)
    packed = pack_indices(idx)
    assert packed.dtype == torch.uint8 and packed.shape == (len(rows), 6)
    assert torch.equal(unpack_indices(packed), idx)


def test_bytes_are_little_endian_and_the_sign_bit_is_a_value_bit():
    idx = torch.tensor([[0, 1, 255, 256, 32767, 32768, 65535]])
    packed = pack_indices(idx)
    assert packed.tolist() == [[0, 0, 1, 0, 255, 0, 0, 1, 255, 127, 0, 128, 255, 255]]
    assert torch.equal(unpack_indices(packed), idx)


def test_strided_inputs():
    idx = torch.arange(60_000, 60_024).view(4, 6)
    assert torch.equal(unpack_indices(pack_indices(idx.t())), idx.t())
    packed = pack_indices(idx)
    assert torch.equal(unpack_indices(torch.stack([packed, packed], 1)[:, 1]), idx)
