"""After each of ten optimizer steps under every engine, the receiver computes the trainer's logits to the bit."""

import json
from pathlib import Path

import pytest
from distributed_runs import run_ranks

ENGINES = ["zero2", "zero3", "fsdp2"]
DTYPES = ["float32", "bfloat16"]
ROWS = 64  # of the tiny model's widest projection


def run(base_folder: Path, tmp_path: Path, ranks: int, cases: list[list]) -> dict[str, list[dict]]:
    """case -> what each rank said."""
    run_ranks(ranks, "sync/ranks_sync.py", {"model": str(base_folder), "out": str(tmp_path), "cases": cases}, tmp_path)
    said = [json.loads((tmp_path / f"said-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    return {case: [one[case] for one in said] for case in said[0]}


def check(found: dict[str, list[dict]]) -> None:
    for case, said in found.items():
        for rank, one in enumerate(said):
            assert one["versions"] == list(range(10)), (case, rank)
            assert all(one["changed"]), (case, rank)
            assert all(one["equal"]), (case, rank, one["equal"])
            assert one["base back"], (case, rank)
        for name in said[0]["rows"]:  # every rank sends its own rows, and together they are all
            bounds = sorted(tuple(one["rows"][name]) for one in said)
            assert [last for _, last in bounds[:-1]] == [first for first, _ in bounds[1:]], (case, name)
        # Nothing travels to make a message, but a delta (64 x 3 in the tiny model) whose rows no rank has whole.
        uneven = case.startswith("zero3") and len(said) == 3
        assert all(one["travelled"] <= (ROWS * 3 + 3 if uneven else 0) for one in said), case


def test_one_rank(base_folder: Path, tmp_path: Path) -> None:
    cases = [[engine, dtype, 3] for engine in ["single", *ENGINES] for dtype in DTYPES]
    check(run(base_folder, tmp_path, 1, cases))


def test_two_ranks(base_folder: Path, tmp_path: Path) -> None:
    cases = [[engine, dtype, 3] for engine in ENGINES for dtype in DTYPES]
    check(run(base_folder, tmp_path, 2, [*cases, ["zero1", "float32", 3]]))


def test_replicas_of_shards_are_refused(base_folder: Path, tmp_path: Path) -> None:
    """Hybrid sharding: each row would be sent twice."""
    argument = {"model": str(base_folder), "out": str(tmp_path), "cases": [], "hybrid": True}
    run_ranks(2, "sync/ranks_sync.py", argument, tmp_path)
    said = json.loads((tmp_path / "said-2-0.json").read_text())
    assert "give the ranks of one replica" in said["hybrid"]["said"]


def test_three_ranks_whose_cut_goes_through_rows(base_folder: Path, tmp_path: Path) -> None:
    """ZeRO-3 then gathers one small tensor at a time, and the ranks share its rows out."""
    check(run(base_folder, tmp_path, 3, [["zero3", "float32", 3], ["fsdp2", "bfloat16", 3]]))


@pytest.mark.long
def test_four_ranks(base_folder: Path, tmp_path: Path) -> None:
    cases = [[engine, dtype, 3] for engine in ENGINES for dtype in DTYPES]
    check(run(base_folder, tmp_path, 4, cases))
