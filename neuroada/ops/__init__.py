"""The numerical kernel: the in-weight bypass and its sampled gradient. Plain tensors in, plain tensors out."""

from neuroada.ops.indices import MAX_IN_FEATURES, pack_indices, unpack_indices
from neuroada.ops.linear import adapted, in_weight_linear, read_entries, write_entries
from neuroada.ops.sampled_gradient import sampled_gradient

__all__ = [
    "MAX_IN_FEATURES",
    "adapted",
    "in_weight_linear",
    "pack_indices",
    "read_entries",
    "sampled_gradient",
    "unpack_indices",
    "write_entries",
]
