"""Every backend of the sampled gradient equals its definition, for any shape, dtype and memory layout."""

import hashlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroada.ops import cpu_kernel, sampled_gradient
from neuroada.ops.sampled_gradient import dense, embedding_bag, fastest, reference

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
BACKENDS = {"operator": sampled_gradient, "embedding_bag": embedding_bag, "dense": dense}


def as_laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "strided":
        return torch.stack([matrix, matrix], -1).flatten(1)[:, ::2]
    if layout == "rows of a wider matrix":
        return torch.cat([matrix, matrix], 1)[:, matrix.shape[1] :]
    return matrix


def random_case(seed, tokens, out, columns, k, dtype):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, out, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    idx = torch.stack([torch.randperm(columns, generator=generator)[:k] for _ in range(out)])
    return dy, x, idx


def assert_equals_reference(found, dy, x, idx):
    expected = reference(dy.double(), x.double(), idx)
    assert found.dtype == torch.promote_types(dy.dtype, torch.float32) and found.shape == idx.shape
    assert (found - expected).norm() <= DTYPES[dy.dtype] * expected.norm()


layouts = st.sampled_from(["contiguous", "transposed", "strided", "rows of a wider matrix"])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_shape_dtype_and_layout(data):
    columns = data.draw(st.integers(1, 70), "columns")
    dtype = data.draw(st.sampled_from(list(DTYPES)), "dtype")
    k = data.draw(st.integers(1, columns), "k")
    case = random_case(
        data.draw(st.integers(0, 99), "seed"),
        data.draw(st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, 300]), "tokens"),
        data.draw(st.integers(1, 70), "out"),
        *(columns, k, dtype),
    )
    dy, x = (as_laid_out(matrix, data.draw(layouts, "layout")) for matrix in case[:2])
    for backend in BACKENDS.values():
        assert_equals_reference(backend(dy, x, case[2]), dy, x, case[2])


def test_reference_is_the_weight_gradient_of_a_linear_at_the_chosen_entries():
    dy, x, idx = random_case(0, 9, 5, 7, 3, torch.float64)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x, weight).backward(dy)
    torch.testing.assert_close(reference(dy, x, idx), weight.grad.gather(1, idx))


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 1, 3)])
def test_any_batch_dimensions(batch):
    x, dy, idx = torch.randn(*batch, 8), torch.randn(*batch, 4), torch.randint(8, (4, 2))
    assert_equals_reference(sampled_gradient(dy, x, idx), dy, x, idx)


def test_expanded_gradient_as_from_a_sum():
    x, idx = torch.randn(2, 40, 8), torch.randint(8, (4, 2))
    dy = torch.ones(()).expand(2, 40, 4)
    assert_equals_reference(sampled_gradient(dy, x, idx), dy, x, idx)
    one_row = torch.randn(1, 4).expand(80, 4)
    assert_equals_reference(sampled_gradient(one_row, x.view(80, 8), idx), one_row, x.view(80, 8), idx)


def test_more_rows_and_tokens_than_one_block():
    for dtype in (torch.float32, torch.float64):
        dy, x, idx = random_case(0, 1100, 300, 200, 5, dtype)
        assert_equals_reference(sampled_gradient(dy, x, idx), dy, x, idx)


@pytest.mark.parametrize("empty", ["tokens", "rows", "k"])
def test_empty_inputs_give_zeros(empty):
    tokens, rows, k = (0 if empty == name else 3 for name in ("tokens", "rows", "k"))
    idx = torch.zeros(rows, k, dtype=torch.long)
    found = sampled_gradient(torch.randn(tokens, rows), torch.randn(tokens, 8), idx)
    assert torch.equal(found, torch.zeros(rows, k))


def test_inputs_of_two_dtypes():
    dy, x, idx = random_case(0, 20, 4, 8, 2, torch.bfloat16)
    wide = dy.float()
    assert_equals_reference(sampled_gradient(wide, x, idx), wide, x, idx)


@pytest.mark.parametrize("wrong", [-1, 8, 2**40])
def test_index_outside_of_x_is_refused(wrong):
    with pytest.raises(IndexError):
        sampled_gradient(torch.randn(3, 2), torch.randn(3, 8), torch.tensor([[1], [wrong]]))


def test_a_nan_of_a_column_nobody_chose_stays_there():
    dy, x = torch.ones(5, 2), torch.ones(5, 3)
    x[2, 1] = float("nan")
    found = sampled_gradient(dy, x, torch.tensor([[0, 2], [1, 2]]))
    assert found.isnan().tolist() == [[False, False], [True, False]]


def test_same_bits_on_every_call_whatever_the_number_of_threads():
    dy, x, idx = random_case(0, 500, 300, 257, 7, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            first = sampled_gradient(dy, x, idx)
            assert_equals_reference(first, dy, x, idx)
            assert torch.equal(first, sampled_gradient(dy, x, idx))
    finally:
        torch.set_num_threads(threads)


def test_is_one_operator_to_fake_tensors():
    with FakeTensorMode():
        found = sampled_gradient(
            torch.empty(2, 9, 4, dtype=torch.bfloat16),
            torch.empty(2, 9, 8, dtype=torch.bfloat16),
            torch.empty(4, 3, dtype=torch.long),
        )
    assert found.shape == (4, 3) and found.dtype == torch.float32
    torch.library.opcheck(sampled_gradient, (torch.randn(9, 4), torch.randn(9, 8), torch.randint(8, (4, 3))))


def test_fastest_is_the_one_that_takes_least_time():
    import time

    def slow(dy, x, idx):
        time.sleep(0.02)

    def quick(dy, x, idx):
        pass

    assert fastest([slow, quick], *random_case(0, 2, 2, 2, 1, torch.float32)) is quick


class TestBuild:
    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cpu_kernel.load.cache_clear()
        yield
        cpu_kernel.load.cache_clear()

    def test_happens_once_and_leaves_the_library_and_its_checksum(self, tmp_path):
        library = cpu_kernel.build()
        first = library.stat().st_mtime_ns
        assert cpu_kernel.build().stat().st_mtime_ns == first
        assert {*(tmp_path / "neuroada").iterdir()} == {library, library.with_suffix(".sha256")}

    @pytest.mark.parametrize("damage", ["cut", "flipped", "without its checksum"])
    def test_a_damaged_library_is_built_again(self, damage):
        """One that a full disk cut off would end the process by SIGBUS when its missing pages are touched."""
        library = cpu_kernel.build()
        whole = library.read_bytes()
        if damage == "without its checksum":
            library.with_suffix(".sha256").unlink()
        else:
            changed = whole[: len(whole) // 2] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1])
            library.write_bytes(changed)
        code = "from neuroada.ops import cpu_kernel; assert cpu_kernel.load() is not None"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert hashlib.sha256(library.read_bytes()).hexdigest() == library.with_suffix(".sha256").read_text()

    def test_a_cache_that_cannot_be_written_falls_back(self, tmp_path):
        library = cpu_kernel.build()
        library.unlink()
        library.with_suffix(".sha256").unlink()
        library.with_suffix(".sha256").mkdir()
        dy, x, idx = random_case(0, 20, 4, 8, 2, torch.float32)
        with pytest.warns(UserWarning, match="no compiled CPU kernels"):
            assert_equals_reference(sampled_gradient(dy, x, idx), dy, x, idx)

    def test_does_not_happen_at_import(self, tmp_path):
        code = "import neuroada.ops"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "CXX": "/none"}, check=True)
        assert not (tmp_path / "neuroada").exists()

    def test_of_several_processes_at_once(self):
        code = "from neuroada.ops import cpu_kernel; assert cpu_kernel.load() is not None"
        ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        assert [rank.wait() for rank in ranks] == [0, 0]

    @pytest.mark.parametrize("compiler, reason", [("/nowhere/c++", "No such file"), ("false", "non-zero exit status")])
    def test_failure_warns_once_with_the_reason_and_falls_back(self, monkeypatch, compiler, reason):
        monkeypatch.setenv("CXX", compiler)
        dy, x, idx = random_case(0, 20, 4, 8, 2, torch.float32)
        with pytest.warns(UserWarning, match=reason):
            assert_equals_reference(sampled_gradient(dy, x, idx), dy, x, idx)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampled_gradient(dy, x, idx)
