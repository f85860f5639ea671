"""The numerical kernel: the in-weight bypass and its sampled gradient. Plain tensors in, plain tensors out."""

from neuroada.ops.adapted_product import FEW_TOKENS, adapted, adapted_product
from neuroada.ops.experts import experts_linear, tokens_of_experts
from neuroada.ops.indices import MAX_IN_FEATURES, pack_indices, unpack_indices
from neuroada.ops.linear import adapted_weight, in_weight_linear, read_entries, write_entries
from neuroada.ops.repeated import sum_repeated
from neuroada.ops.sampled_gradient import sampled_gradient
from neuroada.ops.weight_format import PLAIN, TRANSPOSED, WeightFormat

__all__ = [
    "FEW_TOKENS",
    "MAX_IN_FEATURES",
    "PLAIN",
    "TRANSPOSED",
    "WeightFormat",
    "adapted",
    "adapted_product",
    "adapted_weight",
    "experts_linear",
    "in_weight_linear",
    "pack_indices",
    "read_entries",
    "sampled_gradient",
    "sum_repeated",
    "tokens_of_experts",
    "unpack_indices",
    "write_entries",
]
