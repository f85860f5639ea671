"""How a weight is stored, seen by the product as the matrix [out, in] whose rows are neurons.

A format is a small object without state of a pass: the product asks it for the matrix to read, or for a private copy
to write the adapted entries into. `stored` is the parameter as the module holds it, whole; ZeRO-3 and FSDP2 have
gathered it by then. A new way to store weights is a new class with these two methods.
"""

from typing import Protocol

import torch


class WeightFormat(Protocol):
    """Both methods are called inside autograd functions, in forward and again in backward, by any number of threads."""

    def matrix(self, stored: torch.Tensor) -> torch.Tensor | None:
        """[out, in], floating point, for reading; None where nothing less than `scratch` gives the values."""

    def scratch(self, stored: torch.Tensor) -> torch.Tensor:
        """[out, in], floating point, in memory that nobody else sees."""


class Plain:
    """A Linear's: stored [out, in]."""

    def matrix(self, stored: torch.Tensor) -> torch.Tensor | None:
        return stored

    def scratch(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.detach().clone()


class Transposed:
    """transformers' Conv1D: stored [in, out]."""

    def matrix(self, stored: torch.Tensor) -> torch.Tensor | None:
        return stored.t()

    def scratch(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.detach().clone().t()


PLAIN = Plain()
TRANSPOSED = Transposed()
