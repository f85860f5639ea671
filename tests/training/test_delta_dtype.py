"""adapter.delta_dtype = bf16: deltas and moments are stored in bf16, in one process and sharded; files hold fp32."""

import shutil
from pathlib import Path

import pytest
import torch
from distributed_runs import TinyRuns, assert_same_curve, losses
from safetensors.torch import load_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.methods import make_method

BF16 = "adapter.delta_dtype=bf16"
SOURCES = [("single", 1), ("fsdp2", 2)]


@pytest.fixture(scope="module")
def folders(tiny_runs: TinyRuns) -> dict[tuple[str, int], Path]:
    found = {source: tiny_runs.add(f"bf16-deltas-{source[0]}x{source[1]}", *source, BF16) for source in SOURCES}
    tiny_runs.run()
    return found


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "state.safetensors")


def test_values_and_moments_are_of_bf16_and_stored_in_fp32(folders: dict[tuple[str, int], Path]) -> None:
    for folder in folders.values():
        saved = state(folder, 8)
        deltas = load_file(folder / "adapter" / "adapter_model.safetensors")
        for name, value in [*saved.items(), *((name, v) for name, v in deltas.items() if name.endswith("delta"))]:
            assert value.dtype == torch.float32 and value.any(), name
            assert value.equal(value.bfloat16().float()), name
    assert_same_curve(losses(folders["fsdp2", 2]), losses(folders["single", 1]), relative=1e-3)


def test_a_run_is_resumed_to_the_bit(tiny_runs: TinyRuns, folders: dict[tuple[str, int], Path]) -> None:
    resumed = {}
    for source, folder in folders.items():
        resumed[source] = tiny_runs.add(f"{folder.name}-resumed", *source, BF16)
        shutil.copytree(folder / "checkpoints" / "step-000004", resumed[source] / "checkpoints" / "step-000004")
        shutil.copy(folder / "metrics.jsonl", resumed[source])
    tiny_runs.run()
    for source, folder in resumed.items():
        expected = state(folders[source], 8)
        assert all(value.equal(expected[name]) for name, value in state(folder, 8).items()), source


def test_what_does_not_store_bf16_deltas_refuses_them() -> None:
    recipe = load_recipe("tiny_arithmetic", [BF16])
    for strategy in ("zero1", "zero2", "zero3"):
        with pytest.raises(
            UserError, match=r"adapter\.delta_dtype = bf16: does not run under zero\d: DeepSpeed trains"
        ):
            make_method(recipe).check(strategy)
    with pytest.raises(UserError, match=r"adapter\.delta_dtype = bf16: is of neuroada, not of lora"):
        make_method(recipe, "lora").check("single")
    classifier = load_recipe("roberta_base_sst2", [BF16])
    make_method(classifier).check("single")
    with pytest.raises(UserError, match="its classifier trains in fp32"):
        make_method(classifier).check("fsdp2")
