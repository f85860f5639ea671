"""The seam between a layer and the way its base stores the weight: whole or sharded, as it is or transposed.

The layer and all around it (selection, fingerprint, merge) see a matrix [out_features, in_features] whose rows are
neurons. A base layer of another kind is one more `BaseWeight` in `KINDS`: it says which modules it serves, which
parameter is sharded, how that parameter becomes the matrix in a pass (`format`), and how rows are read and written.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import nn

from neuroada import sharding
from neuroada.adapter.hooks import brought
from neuroada.errors import UserError
from neuroada.ops import PLAIN, TRANSPOSED, WeightFormat
from neuroada.quantised import Quantisation, QuantisedLinear


class BaseWeight:
    """A Linear's weight, stored [out, in] and sharded along its rows."""

    format: WeightFormat = PLAIN
    quantisation: Quantisation | None = None
    writable: ClassVar[bool] = True  # else `merge` makes the layer dense first, by `dequantised`

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.out_features, self.in_features = self._sizes()
        if not hasattr(self, "neurons"):
            self.neurons: tuple[int, ...] = (self.out_features,)  # of the adapter's parameters, [*neurons, .]

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Whether `module`'s forward is a product with a weight stored in this way, and nothing else."""
        weight = module._parameters.get("weight")
        own_forward = type(module).forward is not nn.Linear.forward
        # By type too: torchao's quantised tensors say that they are floating point.
        plain = type(weight).__module__.partition(".")[0] == "torch" and weight.is_floating_point()  # type: ignore[union-attr]
        return isinstance(module, nn.Linear) and not own_forward and plain

    def _sizes(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features  # type: ignore[return-value]

    @property
    def stored(self) -> nn.Parameter:
        """The parameter; under an engine it may be a part, or nothing, outside of a pass."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix in a pass."""
        return self.stored.dtype

    @property
    def bias(self) -> torch.Tensor | None:
        """Part of the product, which is rounded once."""
        return self.layer.bias  # type: ignore[return-value]

    @property
    def added_bias(self) -> torch.Tensor | None:
        """Added after the product was rounded."""
        return None

    @contextmanager
    def own_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, values [rows, in]) this rank works on, for reading; the rows that `beside` gives of idx and delta.

        Collective where the rank does not store whole rows."""
        with brought(self.layer), sharding.own_rows(self.stored) as (rows, values):
            yield rows, values

    def ranked_rows(self, k: int) -> AbstractContextManager[tuple[slice, torch.Tensor]]:
        """As `own_rows`, for selection: values whose k largest in each row are those of the original weight."""
        return self.own_rows()

    def beside(self, param: torch.Tensor) -> AbstractContextManager[tuple[slice, torch.Tensor]]:
        """`own_rows`' rows of a parameter [out, .] of the adapter."""
        return sharding.own_rows(param)

    def dequantised(self) -> nn.Module:
        """A dense layer of the same values: this one, where it is dense."""
        return self.layer

    def write_beside(self, param: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
        """Set `rows` of a parameter of the adapter, as `own_rows` counts them; values [rows, .]. Collective."""
        sharding.write_rows(param, rows, values)

    def join_rows(self, values: torch.Tensor) -> torch.Tensor:
        """All rows, on every rank, of what each computed from its `own_rows`: [out, .]. Collective."""
        return sharding.join_rows(self.stored, values)

    def write_rows(self, rows: slice, values: torch.Tensor) -> None:
        """Set the rows that `own_rows` gave. Collective. A backward over the old values is refused from here on."""
        sharding.write_rows(self.stored, rows, values)
        torch.autograd.graph.increment_version(self.stored)


class FalconWeight(BaseWeight):
    """Falcon's Linear, which adds its bias to the rounded product."""

    bias = None

    @property
    def added_bias(self) -> torch.Tensor | None:
        return self.layer.bias  # type: ignore[return-value]

    @staticmethod
    def serves(module: nn.Module) -> bool:
        falcon = type(module).__module__.startswith("transformers.") and type(module).__name__ == "FalconLinear"
        return falcon and module.weight.is_floating_point()  # type: ignore[operator]


class TransposedWeight(BaseWeight):
    """transformers' Conv1D: stored [in, out], so that a shard is of inputs, and every rank works on all neurons."""

    format: WeightFormat = TRANSPOSED

    @staticmethod
    def serves(module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

    def _sizes(self) -> tuple[int, int]:
        rows, columns = sharding.shape(self.stored)
        return columns, rows

    @contextmanager
    def own_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        with brought(self.layer), sharding.whole(self.stored) as values:
            yield slice(0, self.out_features), values.t()

    @contextmanager
    def beside(self, param: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        with sharding.whole(param) as values:
            yield slice(0, self.out_features), values

    def join_rows(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def write_rows(self, rows: slice, values: torch.Tensor) -> None:
        super().write_rows(slice(0, self.in_features), values.t())


class QuantisedWeight(BaseWeight):
    """Packed bytes, whose rows are the neurons: sharded as they are, and decoded by whoever stores them."""

    layer: QuantisedLinear
    writable = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.format, self.quantisation = self.layer.format, self.layer.quantisation

    @staticmethod
    def serves(module: nn.Module) -> bool:
        return isinstance(module, QuantisedLinear)

    @property
    def stored(self) -> nn.Parameter:
        return self.layer.packed

    @contextmanager
    def own_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        with super().own_rows() as (rows, packed):
            yield rows, self.format.scratch(packed)

    @contextmanager
    def ranked_rows(self, k: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The original's largest entries are stored exactly; further ones are ranked by their dequantised values.

        So are all of a base that an adapter was merged into, whose exact entries are the adapter's too.
        """
        with super().own_rows() as (rows, packed):
            quantisation = self.layer.quantisation
            known = k <= quantisation.exact and not quantisation.merged
            yield rows, self.layer.rows.ranking(packed) if known else self.format.scratch(packed)

    def dequantised(self) -> nn.Linear:
        return self.layer.dequantised()

    def write_rows(self, rows: slice, values: torch.Tensor) -> None:
        raise TypeError("a quantised weight is never written: to quantise it again would lose the deltas")


KINDS: list[type[BaseWeight]] = [BaseWeight, FalconWeight, TransposedWeight, QuantisedWeight]


def base_weight(layer: nn.Module, name: str) -> BaseWeight:
    """The first of `KINDS` that serves this layer; a UserError that says why there is none."""
    for kind in KINDS:
        if kind.serves(layer):
            return kind(layer)
    problem = f"is a {type(layer).__name__}, "
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear):
        problem += "not a Linear"
    elif type(layer).forward is not nn.Linear.forward:
        problem += "whose own forward may do more than a product with its weight"
    elif weight is None:
        problem += "whose weight is computed from other parameters"
    else:
        problem += f"quantised ({type(weight).__name__}, {weight.dtype})"
    raise UserError(f"target_modules: {name} {problem}; leave it out of target_modules")
