"""Ranks share the passes that connections are chosen by; the choice is that of one process that runs them all."""

import json

import pytest
from distributed_runs import run_ranks
from peft import get_peft_model
from ranks_selection import CASES, Two, choose

from neuroada import NeuroAdaConfig, select_by_activations, select_by_gradient
from neuroada.adapter.rounds import Rounds
from neuroada.errors import UserError

RAN = [[0, 3], [1, 4], [2, 4]]  # rank 2 has no second pass, and repeats the last


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """Of three ranks: case -> what it ran and chose."""
    out = tmp_path_factory.mktemp("selection")
    run_ranks(3, "adapter/ranks_selection.py", {"out": str(out)}, out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("case", ["gradient each", "wanda each", "wanda some"])
def test_shared_passes_choose_the_same(found: list[dict[str, dict]], case: str) -> None:
    expected = choose(*CASES[case])
    assert expected["ran"] == [0, 1, 2, 3, 4]
    for rank, ran in zip(found, RAN, strict=True):
        assert rank[case] == {"ran": ran, "chosen": expected["chosen"]}


def test_a_layer_that_some_passes_leave_out_ends_every_rank(found: list[dict[str, dict]]) -> None:
    """By one line: ranks that wait for each other at different layers would hang."""
    assert "no gradient reached second in some pass" in choose("gradient", "some")["error"]
    for rank, ran in zip(found, RAN, strict=True):
        assert rank["gradient some"]["ran"] == ran[:1]
        assert "the ranks' passes reach different layers (first, second)" in rank["gradient some"]["error"]


def test_no_pass_at_all() -> None:
    with pytest.raises(UserError, match="give at least one pass"):
        Rounds([])


@pytest.mark.parametrize("select", [select_by_gradient, select_by_activations])
def test_an_adapter_that_is_not_there(select) -> None:
    tuned = get_peft_model(Two(), NeuroAdaConfig(k=2, target_modules=["first"]))
    with pytest.raises(UserError, match="adapter = 'other': no layer has it; name one of default"):
        select(tuned.base_model, "other", lambda: None)
