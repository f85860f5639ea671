"""Budgets matched by the tool: every method's size field, against counts by hand."""

from pathlib import Path

import pytest

from neuroada.cli.compare import matched
from neuroada.comparison.contenders import Comparison, read_contenders
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.planning.budget import Budget, match
from neuroada.sources.tiny import make_tiny, make_tiny_encoder

LAYERS = 2
# Of make_tiny: hidden 64, two heads of keys and values of 32 together, intermediate 128.
SHAPES = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]  # in, out
ROWS = LAYERS * sum(rows for _, rows in SHAPES)
SIDES = LAYERS * sum(columns + rows for columns, rows in SHAPES)
ENTRIES = LAYERS * sum(columns * rows for columns, rows in SHAPES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


BUDGET = 8 * ROWS + ROWS // 3


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("neuroada", {"k": 8}),
        ("masked", {"k": 8}),
        ("lora", {"rank": round(BUDGET / SIDES)}),
        ("dora", {"rank": round((BUDGET - ROWS) / SIDES)}),  # it trains a magnitude of each row besides
        ("shira", {"rank": round(BUDGET / SIDES)}),
        ("random_entries", {"k": 8}),
        ("supertuning", {"sparsity": 1 - BUDGET / ENTRIES}),
        ("full", {}),
    ],
)
def test_each_method_by_its_own_field(tiny, method, fields):
    recipe = load_recipe("tiny_arithmetic", [f"model={tiny}", f"adapter.method={method}"])
    assert match(recipe, Budget.read(f"trainable={BUDGET}")) == pytest.approx(fields, abs=1e-4)


def test_a_classifier_counts(tmp_path):
    encoder = make_tiny_encoder(tmp_path / "encoder")
    recipe = load_recipe("minilm_sst2", [f"model={encoder}"])
    head = 32 * 32 + 32 + 32 * 2 + 2
    rows = 2 * (4 * 32 + 64 + 32)
    assert match(recipe, Budget.read(f"trainable={head + 5 * rows}")) == {"k": 5}
    assert match(recipe, Budget.read("trainable=1")) == {"k": 1}


def test_a_share_of_the_base():
    recipe = load_recipe("llama7b_math")
    assert match(recipe, Budget.read("trainable=0.02%")) == {"k": 1}
    assert match(recipe, Budget.read("trainable=0.4%")) == {"k": 20}


def test_labels_say_what_was_set(tiny, tmp_path):
    comparison = Comparison("tiny_arithmetic", (f"model={tiny}",), 0, tmp_path)
    methods = read_contenders(["neuroada:selection=random@1e-3", "lora@1e-3", "full@1e-4"], "")
    sized = matched(f"trainable={4 * ROWS}", methods, comparison)
    assert [one.label for one in sized] == [
        "neuroada:selection=random,k=4", f"lora:rank={4 * ROWS // SIDES}", "full"]  # fmt: skip
    recipe = sized[0].recipe(comparison, 1e-3, 0)
    assert (recipe.adapter.k, recipe.adapter.selection) == (4, "random")
    with pytest.raises(UserError, match="neuroada:k=2 sets k itself"):
        matched("trainable=1%", read_contenders(["neuroada:k=2@1e-3"], ""), comparison)


@pytest.mark.parametrize("text", ["0.02%", "trainable=0", "trainable=-1%", "trainable=x%", "trainable=101%", "k=3"])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match=r"must be trainable=0\.02%"):
        Budget.read(text)
