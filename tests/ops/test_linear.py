"""The in-weight linear: values and gradients of the same change made densely, wherever the weight comes from."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from neuroada.ops import (
    FEW_TOKENS,
    TRANSPOSED,
    adapted,
    adapted_product,
    adapted_weight,
    in_weight_linear,
    linear,
    pack_indices,
    unpack_indices,
)
from neuroada.ops.adapted_product import side_product

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


@pytest.mark.parametrize("leading", [(), (0, 9), (2, 9), (2, 3, 3)])
def test_gradients_of_any_leading_dimensions_and_strides(leading: tuple[int, ...]) -> None:
    """Attention's gradients come transposed: their dimensions before the last do not fold into one."""
    case = Case(*MANY)
    case.x = torch.randn(*leading, 7, dtype=torch.float64, requires_grad=True)
    y, expected = case.run(), case.expected()
    dy = torch.randn(*leading[::-1], 5, dtype=torch.float64).permute(*range(len(leading))[::-1], -1)
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


def test_no_pass_writes_into_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while it multiplies nor when it fails: another thread may be reading, Ctrl-C may come at any time."""
    real, seen = linear.F.linear, []

    def out_of_memory(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        assert case.weight.equal(case.original)
        raise MemoryError

    case = Case(*MANY)
    monkeypatch.setattr(linear.F, "linear", out_of_memory)
    with pytest.raises(MemoryError):
        case.run()
    assert case.weight.equal(case.original) and not seen[0].equal(case.original)
    monkeypatch.setattr(linear.F, "linear", real)
    version = case.weight._version
    case.run().sum().backward()
    assert case.weight._version == version


def test_the_sum_is_rounded_once_to_the_weights_dtype() -> None:
    case = Case(*MANY, dtype=torch.bfloat16)
    idx = unpack_indices(case.idx_bytes)
    found = adapted_weight(case.weight, case.idx_bytes, case.delta)
    base = case.original.gather(1, idx)
    assert found.gather(1, idx).equal((base.float() + case.delta.detach()).bfloat16())
    assert found.equal(case.original.scatter(1, idx, adapted(base, case.delta)))


@pytest.mark.parametrize("tokens", [1, 2, 5, FEW_TOKENS])
@pytest.mark.parametrize("shape", [FEW, MANY, (130, 576, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("product", [adapted_product, side_product])
def test_a_few_tokens(product, tokens: int, shape: tuple, dtype: torch.dtype, bias: bool) -> None:
    """The product for decoding is that with W', its entries rounded once, up to the order of the sum."""
    case = Case(*shape, dtype=dtype)
    x = case.x.detach().flatten(0, 1).repeat(2, 1)[:tokens, None]
    added = case.bias.detach() if bias else None
    found = product(x, case.weight.detach(), added, case.idx_bytes, case.delta.detach())
    wide = adapted_weight(case.weight, case.idx_bytes, case.delta).double()
    expected = F.linear(x.double(), wide, None if added is None else added.double())
    assert found.shape == (tokens, 1, shape[0]) and found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * shape[1] ** 0.5)


def test_a_few_tokens_of_a_sliced_weight_and_of_a_transposed_one() -> None:
    case = Case(*MANY)
    x, wide = case.x.detach()[:1, :3], torch.randn(5, 12, dtype=torch.float64)
    for weight in (wide[:, 2:9], torch.randn(7, 5, dtype=torch.float64).t()):
        found = adapted_product(x, weight, None, case.idx_bytes, case.delta.detach())
        torch.testing.assert_close(found, F.linear(x, adapted_weight(weight, case.idx_bytes, case.delta)))


def test_an_index_outside_of_the_weight_is_refused() -> None:
    case = Case(*MANY)
    outside = pack_indices(torch.full((5, 3), 7))
    with pytest.raises(IndexError):
        adapted_product(case.x.detach()[:1, :3], case.weight.detach(), None, outside, case.delta.detach())


def test_a_transposed_weight() -> None:
    case = Case(*MANY)
    stored = torch.nn.Parameter(case.original.t().contiguous(), requires_grad=False)
    y = in_weight_linear(case.x, stored, case.bias, case.idx_bytes, case.delta, TRANSPOSED)
    expected = case.expected()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, wanted in zip(case.gradients(y, dy), case.gradients(expected, dy), strict=True):
        torch.testing.assert_close(found, wanted)
    few = in_weight_linear(case.x[:, :1], stored, case.bias, case.idx_bytes, case.delta, TRANSPOSED)
    torch.testing.assert_close(few, expected[:, :1])


def test_a_second_derivative_is_refused() -> None:
    case = Case(*MANY)
    (first,) = torch.autograd.grad((case.run() ** 2).sum(), case.delta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_weight_changed_between_forward_and_backward_is_refused() -> None:
    case = Case(*MANY)
    y = case.run()
    torch.autograd.graph.increment_version(case.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize("tokens", [1, 9])
def test_autocast_over_an_fp32_weight(shape: tuple[int, int, int], tokens: int) -> None:
    """As an fp32 Linear with the adapted weight runs under autocast, forward and backward."""
    case = Case(*shape, dtype=torch.float32)
    x, dense = case.x[:, :tokens], adapted_weight(case.weight, case.idx_bytes, case.delta).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = in_weight_linear(x, case.weight, case.bias, case.idx_bytes, case.delta)
        expected = F.linear(x, dense, case.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (case.x, case.bias, case.delta), dy)
    wanted = torch.autograd.grad(expected, (case.x, case.bias, dense), dy)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1], wanted[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[2], wanted[2].gather(1, unpack_indices(case.idx_bytes)), rtol=2e-2, atol=5e-2)


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
