"""A frozen Linear whose weight is stored quantised, and dequantised for each product."""

import torch
from torch import nn

from neuroada.ops import in_weight_linear
from neuroada.quantised.packed import PackedRows, Quantisation


class PackedFormat:
    """A `WeightFormat`: packed rows, seen as the matrix [out, in] in `dtype`."""

    def __init__(self, rows: PackedRows, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype

    def matrix(self, stored: torch.Tensor) -> torch.Tensor | None:
        return None

    def scratch(self, stored: torch.Tensor) -> torch.Tensor:
        return self.rows.decode(stored.detach(), self.dtype)


class QuantisedLinear(nn.Module):
    """y = x @ dequantised.T + bias. `packed` [out, bytes of a row] uint8 is the only tensor of the weight.

    `dtype` is the dequantised weight's, the one to compute in. Neither forward nor backward keeps the dense weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantisation: Quantisation,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.rows = PackedRows(quantisation, in_features, name)
        self.format = PackedFormat(self.rows, dtype)
        packed = torch.zeros(out_features, self.rows.row_bytes, dtype=torch.uint8, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, quantisation: Quantisation, name: str = "weight") -> "QuantisedLinear":
        """A Linear's weight, quantised; on the meta device: the layer alone."""
        weight = linear.weight
        made = cls(
            linear.in_features,
            linear.out_features,
            quantisation,
            weight.dtype,
            linear.bias,
            weight.device,
            name,
        )
        if not weight.is_meta:
            made.packed.data = made.rows.encode(weight.detach())
        return made.train(linear.training)

    @property
    def quantisation(self) -> Quantisation:
        return self.rows.quantisation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        none = self.packed.new_empty(self.out_features, 0)
        return in_weight_linear(x, self.packed, self.bias, none, none.float(), self.format)

    def dequantised(self) -> nn.Linear:
        """The same layer, dense."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.rows.decode(self.packed.detach(), self.dtype), requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantisation.describe()}"
