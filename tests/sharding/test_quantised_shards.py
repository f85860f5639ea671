"""A quantised base is sharded as any parameter is: each rank stores its rows, and learns what one process learns."""

import json
from pathlib import Path

import pytest
from distributed_runs import ENGINES, run_ranks

from neuroada.quantised import PackedRows, Quantisation
from neuroada.sources.tiny import make_tiny

K = 4
NF4 = ["base.model_dtype=nf4", f"adapter.k={K}", "adapter.target_modules=[q_proj, v_proj, down_proj]"]
INT8 = ["base.model_dtype=int8", "base.exact=0", f"adapter.k={K}"]
SHAPES = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]  # out, in of the tiny model
CASES = {
    "single": [*ENGINES["single"], *NF4],
    "zero2": [*ENGINES["zero2"], *NF4],
    "zero3": [*ENGINES["zero3"], *NF4],
    "fsdp2": [*ENGINES["fsdp2"], *NF4],
    "fsdp2 checkpointed": [*ENGINES["fsdp2"], *NF4, "train.activation_checkpointing=true"],
    "zero3 checkpointed": [*ENGINES["zero3"], *NF4, "train.activation_checkpointing=true"],
    "single int8": [*ENGINES["single"], *INT8],
    "zero3 int8": [*ENGINES["zero3"], *INT8],
    "fsdp2 int8": [*ENGINES["fsdp2"], *INT8],
}


def run(tmp: Path, rank_counts: list[int], names: list[str], steps: int = 5) -> dict[str, dict[int, list[dict]]]:
    """case -> world size -> what each rank said."""
    tiny = make_tiny(tmp / "tiny")
    for ranks in rank_counts:
        cases = {
            name: [*CASES[name], f"model={tiny}", f"output_dir={tmp / 'run'}"]
            for name in names
            if ("single" in name) == (ranks == 1)
        }
        argument = {"out": str(tmp / "out"), "cases": cases, "steps": steps}
        run_ranks(ranks, "sharding/ranks_sharding.py", argument, tmp)
    return {
        case.name: {
            int(size.name): [json.loads((size / f"{rank}.json").read_text()) for rank in range(int(size.name))]
            for size in case.iterdir()
        }
        for case in (tmp / "out").iterdir()
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list[dict]]]:
    return run(tmp_path_factory.mktemp("quantised"), [1, 2], list(CASES))


def check(found: dict, ranks: int) -> None:
    for case, by_size in found.items():
        one = found["single int8" if "int8" in case else "single"][1][0]
        for rank in by_size.get(ranks, []):
            assert rank["losses"] == pytest.approx(one["losses"], rel=1e-6), case
            assert rank["fingerprint"] == one["fingerprint"], case
            assert rank["quantised base stays"], case


def packed_bytes(quantisation: Quantisation) -> int:
    return sum(out * PackedRows(quantisation, inputs).row_bytes for out, inputs in SHAPES)


def test_two_ranks_learn_what_one_learns(found) -> None:
    assert found["single"][1][0]["losses"][-1] < found["single"][1][0]["losses"][0]
    check(found, 2)


@pytest.mark.parametrize("case", ["single", "zero2", "zero3", "fsdp2", "zero3 int8", "fsdp2 int8"])
def test_a_model_loaded_by_any_engine_is_not_saved_as_an_ordinary_one(found, case: str) -> None:
    """save_pretrained would write a config.json over which transformers starts from random weights."""
    for ranks in found[case].values():
        for rank in ranks:
            assert "neuroada and is not serializable" in rank["refused"]["save_pretrained"]
            if len(ranks) > 1 and "zero2" not in case:
                assert "that is sharded is not made dense" in rank["refused"]["dequantize"]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_rank_stores_its_part(found, engine: str) -> None:
    one = found["single"][1][0]["before"]["weights"]
    for rank in found[engine][2]:
        assert rank["before"]["weights"] == pytest.approx(one / 2, abs=256)
    dense = one - packed_bytes(Quantisation("nf4", K))
    assert dense > 0
    assert found["single int8"][1][0]["before"]["weights"] - packed_bytes(Quantisation("int8")) == dense


def test_twenty_steps_on_three_and_four_ranks(tmp_path: Path) -> None:
    """Three ranks do not divide the rows, four do."""
    found = run(tmp_path, [1, 3, 4], ["single", "zero3", "fsdp2"], steps=20)
    one = found["single"][1][0]
    assert len(one["losses"]) == 20
    for ranks in (3, 4):
        check(found, ranks)
        for engine in ("zero3", "fsdp2"):
            assert len(found[engine][ranks]) == ranks
            for kind in ("weights", "idx", "delta"):
                stored = [rank["stored"][kind] for rank in found[engine][ranks]]
                assert max(stored) <= one["stored"][kind] / ranks + 512, (engine, ranks, kind)


@pytest.mark.long
def test_every_case_on_three_and_four_ranks(tmp_path: Path) -> None:
    found = run(tmp_path, [1, 3, 4], list(CASES))
    for ranks in (3, 4):
        check(found, ranks)
        for engine in ("zero3", "fsdp2"):
            one = found["single"][1][0]["before"]["weights"]
            assert max(rank["before"]["weights"] for rank in found[engine][ranks]) <= one / ranks + 8192
