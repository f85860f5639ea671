"""The loss equals torch's cross-entropy, in any division into micro batches, without its copies of the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from neuroada.objectives import cross_entropy
from neuroada.objectives.cross_entropy import answer_loss, cross_entropy_sum
from neuroada.objectives.micro_batch import MicroBatch


def case(dtype: torch.dtype, positions: int = 40, vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = (4 * torch.randn(positions, vocabulary)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (positions,))
    targets[::3] = -100
    return hidden, targets


@pytest.mark.parametrize("chunk", [1, 170, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    hidden, targets = case(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.cross_entropy((hidden * 1).to(wide), targets, ignore_index=-100, reduction="sum")
    found = cross_entropy_sum(hidden * 1, targets)
    torch.testing.assert_close(found, expected)
    wanted, gradient = (torch.autograd.grad(total / 7, hidden)[0] for total in (expected, found))
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[::3].any()


def test_no_loss_anywhere_is_zero() -> None:
    hidden, targets = case(torch.float32)
    total = cross_entropy_sum(hidden * 1, torch.full_like(targets, -100))
    total.backward()
    assert total.item() == 0 and not hidden.grad.any()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 0.0, 1e30]], requires_grad=True)
    total = cross_entropy_sum(logits * 1, torch.tensor([0, 2]))
    total.backward()
    assert total.item() == 0 and logits.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The elements of the largest new tensor."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_tensor_of_the_logits_size(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 100)
    hidden, targets = case(dtype)
    logits = hidden * 1
    with Largest(logits) as seen:
        total = cross_entropy_sum(logits, targets)
    assert 0 < seen.largest <= 100
    gradients: list[int] = []
    logits.register_hook(lambda gradient: gradients.append(gradient.data_ptr()))
    total.backward()
    assert gradients == [logits.data_ptr()]


class Scores(torch.nn.Module):
    """A "model" whose logits are a table of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, 9))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> "Scores":
        assert not use_cache
        self.logits = self.table[input_ids]
        return self


def test_parts_add_up_to_the_mean_over_the_whole() -> None:
    torch.manual_seed(0)
    model, ids, targets = Scores(), torch.randint(9, (4, 6)), torch.randint(9, (4, 6))
    targets[:, :2] = -100
    expected = F.cross_entropy(model.table[ids].flatten(0, 1), targets.flatten(), ignore_index=-100)
    parts = [answer_loss(model, MicroBatch({"input_ids": ids[rows]}, targets[rows], 6)) for rows in ([0, 2, 3], [1])]
    torch.testing.assert_close(sum(parts) / 16, expected)


def test_without_a_gradient_the_logits_are_left_as_they_are() -> None:
    hidden, targets = case(torch.float32)
    for logits in (hidden.detach() * 1, (hidden * 1).detach()):
        before = logits.clone()
        found = cross_entropy_sum(logits, targets)
        assert logits.equal(before) and not found.requires_grad
    with torch.no_grad():
        logits = hidden * 1
        before = logits.clone()
        cross_entropy_sum(logits, targets)
        assert logits.equal(before)


def test_a_graph_that_still_needs_the_logits_is_refused() -> None:
    """The logits are overwritten: autograd is told, and does not compute from their remains."""
    hidden, targets = case(torch.float32)
    logits = hidden.tanh()  # saves its result
    total = cross_entropy_sum(logits, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
