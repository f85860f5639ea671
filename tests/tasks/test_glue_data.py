"""GLUE: both file layouts, labels, metrics and the split protocol."""

import json
import math

import pytest

from neuroada.errors import UserError
from neuroada.tasks import glue
from neuroada.tasks.data import load_examples
from neuroada.tasks.table import get_task


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_json(tmp_path):
    write(tmp_path / "glue/mnli/validation.json", [{"sentence1": "A.", "sentence2": "B.", "label": 2, "idx": 0}])
    write(tmp_path / "glue/stsb/train.json", [{"sentence1": "A.", "sentence2": "B.", "label": 3.8}])
    pair = {"sentence1": "A.", "sentence2": "B."}
    assert load_examples(get_task("glue/mnli"), "validation", tmp_path) == [pair | {"label": "2"}]
    assert load_examples(get_task("glue/stsb"), "train", tmp_path) == [pair | {"label": "3.8"}]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("sst2", {"sentence": "good", "label": 2}, "row 1: label is '2', expected one of 0, 1"),
        ("sst2", {"sentence": "good", "label": -1}, "row 1: label is '-1', expected one of 0, 1"),
        ("sst2", {"sentence": "good"}, "row 1: key 'label' is missing"),
        ("sst2", {"label": 1}, "row 1: key 'sentence' is missing"),
        ("sst2", {"sentence": 5, "label": 1}, "row 1: sentence is 5, expected a string"),
        (
            "stsb",
            {"sentence1": "a", "sentence2": "b", "label": 6},
            "row 1: label is '6', expected a number from 0 to 5",
        ),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "nan"}, "row 1: label is 'nan'"),
        ("rte", {"sentence": "a", "label": 1}, "row 1: key 'sentence1' is missing"),
    ],
)
def test_bad_rows(tmp_path, name, bad, message):
    write(tmp_path / f"glue/{name}/train.json", [bad])
    with pytest.raises(UserError, match=message):
        load_examples(get_task(f"glue/{name}"), "train", tmp_path)


def test_no_test_set(tmp_path):
    with pytest.raises(UserError, match="score its validation split"):
        load_examples(get_task("glue/sst2"), "test", tmp_path)


def test_tsv(tmp_path):
    write(tmp_path / "glue/SST-2/dev.tsv", 'sentence\tlabel\n"fine \t1\nbad \t0\n')
    write(tmp_path / "glue/CoLA/train.tsv", "gj04\t0\t*\tHe ran not.\ngj04\t1\t\tHe ran.")
    assert load_examples(get_task("glue/sst2"), "validation", tmp_path)[0] == {"sentence": '"fine ', "label": "1"}
    assert [one["label"] for one in load_examples(get_task("glue/cola"), "train", tmp_path)] == ["0", "1"]
    write(tmp_path / "glue/SST-2/dev.tsv", "sentence\tlabel\nfine\t1\nbad\n")
    with pytest.raises(UserError, match=r"dev.tsv, row 2: 1 fields .* expected 2: sentence, label"):
        load_examples(get_task("glue/sst2"), "validation", tmp_path)


def test_real_tsv(shared_data):
    sizes = {("sst2", "train"): 67_349, ("sst2", "validation"): 872, ("cola", "train"): 7_250}
    sizes[("cola", "validation")] = 1_043
    for (name, split), size in sizes.items():
        assert len(load_examples(get_task(f"glue/{name}"), split, shared_data)) == size
    first = load_examples(get_task("glue/cola"), "validation", shared_data)[0]
    assert first == {"sentence": "The sailors rode the breeze clear of the rocks.", "label": "1"}


@pytest.mark.parametrize(("size", "chosen"), [(872, 436), (277, 138), (5_000, 2_500), (5_001, 1_000), (9_815, 1_000)])
def test_split_protocol(size, chosen):
    choose, report = glue.split_validation(range(size), seed=42)
    assert len(choose) == chosen
    assert sorted(choose + report) == list(range(size))
    assert (choose, report) == glue.split_validation(range(size), seed=42)
    assert choose != glue.split_validation(range(size), seed=43)[0]
    assert choose != list(range(chosen))


def test_metrics():
    assert glue.score("accuracy", [1, 0, 1, 1], [1, 0, 0, 1]) == 0.75
    # by hand: tp 2, tn 1, fp 1, fn 0
    assert glue.score("matthews", [1, 0, 1, 1], [1, 0, 0, 1]) == pytest.approx(2 / math.sqrt(3 * 2 * 2 * 1))
    assert glue.score("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert glue.score("pearson", [1.0, 1.0, 1.0], [2.0, 4.0, 6.0]) == 0.0
