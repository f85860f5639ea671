"""Linear layers whose frozen weight is stored in four or eight bits, as plain uint8 parameters that any engine shards.

A layer dequantises its weight for a product and drops it. Nothing here names an engine or an adapter.
"""

from neuroada.quantised.linear import QuantisedLinear
from neuroada.quantised.model import declare_dense, dequantise, quantise
from neuroada.quantised.packed import FORMATS, METHOD, PackedRows, Quantisation

__all__ = [
    "FORMATS",
    "METHOD",
    "PackedRows",
    "Quantisation",
    "QuantisedLinear",
    "declare_dense",
    "dequantise",
    "quantise",
]
