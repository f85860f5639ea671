"""The in-weight linear: values and gradients of the same change made densely, wherever the weight comes from."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from neuroada.ops import adapted, in_weight_linear, linear, pack_indices, unpack_indices

FEW, MANY = (3, 16, 2), (5, 7, 3)
"""out, in and k, so that the entries are few beside the inputs (only they are kept of x), and not."""


class Case:
    def __init__(self, out: int, columns: int, k: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(out, columns, dtype=dtype), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(out, dtype=dtype))
        self.original = self.weight.data.clone()
        self.x = torch.randn(2, 9, columns, dtype=dtype, requires_grad=True)
        self.idx_bytes, self.delta = self.adapter(k)

    def adapter(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        idx = torch.rand(self.weight.shape).topk(k, 1).indices
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return pack_indices(idx), torch.randn(idx.shape, dtype=wide, requires_grad=True)

    def run(self) -> torch.Tensor:
        return in_weight_linear(self.x, self.weight, self.bias, self.idx_bytes, self.delta)

    def expected(self) -> torch.Tensor:
        """The textbook form: a dense weight + delta, by autograd."""
        change = torch.zeros_like(self.original).scatter(1, unpack_indices(self.idx_bytes), self.delta)
        return F.linear(self.x, self.original + change, self.bias)

    def gradients(self, y: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (self.x, self.bias, self.delta), dy)


@pytest.mark.parametrize("shape", [FEW, MANY])
def test_values_and_gradients_are_those_of_the_dense_form(shape: tuple[int, int, int]) -> None:
    case = Case(*shape)
    y, expected = case.run(), case.expected()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, wanted in zip(case.gradients(y, dy), case.gradients(expected, dy), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize("meanwhile", ["gathered anew", "another adapter ran", "nothing"])
def test_backward_whatever_became_of_the_weight_since_forward(shape: tuple[int, int, int], meanwhile: str) -> None:
    case = Case(*shape)
    y, expected = case.run(), case.expected()
    if meanwhile == "gathered anew":  # as ZeRO-3 and FSDP2 do
        case.weight.data = case.original.clone()
    if meanwhile == "another adapter ran":
        in_weight_linear(case.x, case.weight, None, *case.adapter(2))
    dy = torch.randn_like(y)
    for found, wanted in zip(case.gradients(y, dy), case.gradients(expected, dy), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_left_as_it_was_found(dtype: torch.dtype) -> None:
    case = Case(*MANY, dtype=dtype)
    y = case.run()
    assert case.weight.equal(case.original)
    case.gradients(y, torch.randn_like(y))
    assert case.weight.equal(case.original)


def test_the_weight_is_left_as_it_was_found_by_a_pass_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, caught, and tried again smaller: the second pass must not start from the first one's deltas."""

    def out_of_memory(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        assert not weight.equal(case.original)
        raise MemoryError

    case = Case(*MANY)
    monkeypatch.setattr(linear.F, "linear", out_of_memory)
    with pytest.raises(MemoryError):
        case.run()
    assert case.weight.equal(case.original)


def test_the_sum_is_rounded_once_to_the_weights_dtype() -> None:
    case = Case(*MANY, dtype=torch.bfloat16)
    idx = unpack_indices(case.idx_bytes)
    with linear.bypass(case.weight, case.idx_bytes, case.delta):
        found = case.weight.gather(1, idx)
    base = case.original.gather(1, idx)
    assert found.equal((base.float() + case.delta.detach()).bfloat16())
    assert found.equal(adapted(base, case.delta))


def test_gradients_of_bf16_are_computed_in_fp32() -> None:
    for shape in (FEW, MANY):
        case = Case(*shape, dtype=torch.bfloat16)
        y = case.run()
        dy = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, case.delta, dy)
        dense = dy.flatten(0, 1).float().t() @ case.x.detach().flatten(0, 1).float()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, dense.gather(1, unpack_indices(case.idx_bytes)))


def saved(case: Case) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        case.run()
    return found


def test_x_itself_is_kept_so_that_layers_of_one_input_share_it() -> None:
    case = Case(*MANY)
    assert any(tensor is case.x or tensor.data_ptr() == case.x.data_ptr() for tensor in saved(case))


def test_of_a_wide_input_only_the_selected_entries_are_kept() -> None:
    case = Case(*FEW)
    shapes = [tuple(tensor.shape) for tensor in saved(case)]
    assert (2, 9, 3 * 2) in shapes and (2, 9, 16) not in shapes


def test_the_weight_itself_is_saved_not_a_view() -> None:
    """ZeRO-3 and FSDP2 swap a Parameter's data between forward and backward."""
    case = Case(*MANY)
    assert any(tensor is case.weight for tensor in saved(case))


def test_no_gradient_for_an_input_that_needs_none() -> None:
    case = Case(*MANY)
    case.x = case.x.detach()
    y = case.run()
    case.weight.data.fill_(float("nan"))  # backward must not touch it
    (gradient,) = torch.autograd.grad(y.sum(), case.delta)
    assert gradient.isfinite().all()
