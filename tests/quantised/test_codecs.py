"""The bits of the formats: those of bitsandbytes and torchao, by any division of the rows."""

import pytest
import torch

from neuroada.errors import UserError
from neuroada.ops.selection import select_top_k
from neuroada.quantised import FORMATS, PackedRows, Quantisation
from neuroada.quantised.codecs import CODECS

DTYPES = [torch.float32, torch.bfloat16]


def weight(rows: int = 48, inputs: int = 192, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_bitsandbytes_to_the_bit(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = weight(dtype=dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, scales = CODECS["nf4"].encode(w)
    assert codes.flatten().equal(theirs.flatten())
    assert scales.flatten().equal(state.absmax)
    expected = functional.dequantize_4bit(theirs, state)
    assert CODECS["nf4"].decode(codes, scales).to(dtype).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_int8_and_fp8_are_torchao_to_the_bit(name: str, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig if name == "int8" else quantization.Float8WeightOnlyConfig
    w = weight(dtype=dtype)
    linear = torch.nn.Linear(192, 48, bias=False, dtype=dtype)
    linear.weight.data = w.clone()
    quantization.quantize_(linear, config(set_inductor_config=False))
    codes, scales = CODECS[name].encode(w)
    theirs = linear.weight
    assert codes.view(torch.uint8).equal(theirs.qdata.view(torch.uint8))
    assert scales.equal(theirs.scale.float().view(-1, 1))
    assert CODECS[name].decode(codes, scales).to(dtype).equal(theirs.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_encoded_each_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, w = PackedRows(Quantisation(name, 5), 192), weight()
    packed = rows.encode(w)
    assert packed.shape == (48, rows.row_bytes)
    assert torch.cat([rows.encode(w[:7]), rows.encode(w[7:])]).equal(packed)
    whole = rows.decode(packed, torch.bfloat16)
    assert rows.decode(packed[7:9], torch.bfloat16).equal(whole[7:9])
    monkeypatch.setattr("neuroada.quantised.packed.CPU_CHUNK", 192 * 5)
    assert rows.encode(w).equal(packed)
    assert rows.decode(packed, torch.bfloat16).equal(whole)


@pytest.mark.parametrize("name", FORMATS)
def test_exact_entries_are_the_original_s_largest(name: str) -> None:
    rows, w = PackedRows(Quantisation(name, 5), 192), weight(dtype=torch.bfloat16)
    packed, largest = rows.encode(w), select_top_k(w, 5, "magnitude")
    assert rows.exact_entries(packed)[0].equal(largest)
    assert rows.decode(packed, torch.float32).gather(1, largest).equal(w.gather(1, largest).float())
    assert select_top_k(rows.ranking(packed), 3, "magnitude").equal(select_top_k(w, 3, "magnitude"))
    plain = PackedRows(Quantisation(name), 192)
    error = (plain.decode(plain.encode(w), torch.float32) - w).square().sum()
    assert (rows.decode(packed, torch.float32) - w).square().sum() < error


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_and_damaged_rows(name: str) -> None:
    rows = PackedRows(Quantisation(name), 64)
    assert rows.decode(rows.encode(torch.zeros(3, 64)), torch.float32).equal(torch.zeros(3, 64))
    with pytest.raises(UserError, match="not finite"):
        rows.encode(torch.full((3, 64), float("nan")))


def test_a_block_that_does_not_fit_is_told() -> None:
    with pytest.raises(UserError, match=r"q_proj has 96 inputs, not a multiple of the block of 64; use int8 or fp8"):
        PackedRows(Quantisation("nf4"), 96, "q_proj")
    with pytest.raises(UserError, match=r"base\.exact = 65"):
        PackedRows(Quantisation("int8", 65), 64)
    with pytest.raises(UserError, match="no known quantisation"):
        Quantisation.from_json({"format": "nf3", "exact": 1}, "config.json")
    assert Quantisation.from_json(Quantisation("nf4", 3).as_json(), "config.json") == Quantisation("nf4", 3)
