import pytest

from neuroada.evaluation.results import averages, summarize
from neuroada.tasks.statistics import wilson
from neuroada.tasks.table import get_task


def prediction(published: bool, sound: bool, seen: bool | None, gold: str = "1") -> dict:
    return {"published": {"correct": published}, "sound": {"correct": sound}, "gold": gold, "seen_in_training": seen}


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_wilson_against_known_values(correct, n, interval):  # the last: Newcombe 1998, table I
    assert wilson(correct, n) == pytest.approx(interval, abs=5e-5)


def test_summarize_counts_both_rules_and_the_unseen():
    rows = [prediction(True, True, True), prediction(False, True, False), prediction(False, False, False)]
    entry = summarize(get_task("AddSub"), rows)
    assert (entry["n"], entry["published"], entry["sound"]) == (3, 1 / 3, 2 / 3)
    assert entry["unseen"] | {"interval": None} == {"n": 2, "published": 0.0, "sound": 0.5, "interval": None}
    assert summarize(get_task("AddSub"), [prediction(True, True, None)])["unseen"] is None
    assert summarize(get_task("AddSub"), [prediction(True, True, True)])["unseen"] == {
        "n": 0,
        "published": None,
        "sound": None,
        "interval": {"published": None, "sound": None},
    }


def test_baseline_is_the_majority():
    rows = [prediction(False, False, None, gold) for gold in ("true", "true", "false", "true")]
    assert summarize(get_task("boolq"), rows)["baseline"] == 0.75


def test_averages_per_suite():
    tasks = [get_task(name) for name in ("AddSub", "gsm8k", "boolq")]
    entry = {"n": 10, "published": 0.5, "sound": 0.25, "baseline": 0.0}
    entries = {"AddSub": entry, "gsm8k": entry | {"sound": 0.75, "n": 30}, "boolq": entry}
    assert averages(tasks, entries) == {"math": {"n": 40, "published": 0.5, "sound": 0.5, "baseline": 0.0}}
