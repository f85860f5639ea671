"""benchmarks/memory_by_shape.py: what the table of docs/plan.md is made by."""

import importlib
from pathlib import Path

import pytest

from neuroada.config.recipe import load_recipe
from neuroada.planning.plan import compare_methods


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("memory_by_shape")


def test_a_row_is_what_plan_says(benchmark):
    shape = benchmark.Shape("2 x 256", 2, 256, checkpointing=True)
    (row,) = benchmark.compare("llama32_1b_math", (shape,))
    recipe = load_recipe("llama32_1b_math", ["adapter.trainable_dtype=bf16", *shape.overrides()])
    planned, _ = compare_methods(recipe)
    assert {name: row[name] for name in benchmark.METHODS} == {
        name: planned[name].peak_bytes for name in benchmark.METHODS
    }
    told = benchmark.line(row)
    assert told.startswith("| Llama-3.2-1B | 2 x 256 | ") and told.count("|") == 9
    assert row["neuroada"] < min(row["full"], row["masked"])


def test_every_shape_is_of_its_recipes(benchmark):
    """The published batch among them; every row fits the longest sequences of its recipe."""
    assert {(shape.rows, shape.length) for shape in benchmark.SHAPES} == {(1, 2048), (16, 512)}
    for name in benchmark.RECIPES:
        for shape in benchmark.SHAPES:
            train = load_recipe(name, shape.overrides()).train
            assert (train.packed, train.activation_checkpointing) == (shape.packing, shape.checkpointing)
