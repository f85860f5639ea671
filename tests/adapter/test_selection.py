import pytest
import torch

from neuroada.adapter.selection import select_top_k


def by_sorting(scores: torch.Tensor, k: int, largest: bool = True) -> torch.Tensor:
    """The definition: a stable sort, so that equal weights go to the lower column."""
    order = scores.abs().float().sort(dim=1, descending=largest, stable=True).indices
    return order[:, :k].sort(dim=1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 20, 64])
def test_magnitude_and_reverse_with_ties(dtype: torch.dtype, k: int) -> None:
    scores = torch.randint(-4, 5, (50, 64), generator=torch.Generator().manual_seed(0)).to(dtype)  # ties everywhere
    assert select_top_k(scores, k, "magnitude").equal(by_sorting(scores, k))
    assert select_top_k(scores, k, "reverse").equal(by_sorting(scores, k, largest=False))


@pytest.mark.parametrize("selection", ["magnitude", "reverse", "random"])
def test_any_cut_of_the_rows_gives_the_same_choice(selection) -> None:
    scores = torch.randn(13, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = select_top_k(scores, 5, selection, seed=3)
    parts = [select_top_k(scores[a:b], 5, selection, first_row=a, seed=3) for a, b in ((0, 5), (5, 6), (6, 13))]
    assert torch.cat(parts).equal(whole)


def test_random_is_uniform_and_follows_the_seed() -> None:
    scores = torch.zeros(4000, 16)
    chosen = select_top_k(scores, 4, "random", seed=1)
    assert (chosen.diff(dim=1) > 0).all()  # distinct columns
    counts = torch.bincount(chosen.flatten(), minlength=16) / 4000
    assert (counts - 0.25).abs().max() < 0.03
    assert not chosen.equal(select_top_k(scores, 4, "random", seed=2))
    assert chosen.equal(select_top_k(scores, 4, "random", seed=1))


def test_more_rows_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(100, 32, generator=torch.Generator().manual_seed(2))
    whole = select_top_k(scores, 3, "magnitude")
    monkeypatch.setattr("neuroada.ops.selection.CPU_CHUNK", 64)
    assert select_top_k(scores, 3, "magnitude").equal(whole)
