"""The table has a row for each of the 23 tasks, and a wrong name is answered with the nearest ones."""

import pytest

from neuroada.errors import UserError
from neuroada.tasks.table import TASKS, get_task

COMMONSENSE = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
MATH = ["MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps"]
GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]


@pytest.mark.parametrize("name", COMMONSENSE)
def test_commonsense_row(name):
    task = get_task(name)
    assert (task.suite, task.max_new_tokens, task.train_file, task.test_file) == ("commonsense", 32, name, name)


@pytest.mark.parametrize("name", MATH)
def test_math_row(name):
    task = get_task(name)
    assert (task.suite, task.max_new_tokens, task.test_file) == ("math", 512, name)


@pytest.mark.parametrize("name", GLUE)
def test_glue_row(name):
    task = get_task(f"glue/{name}")
    assert (task.suite, task.max_new_tokens, task.train_file) == ("glue", 0, f"glue/{name}")
    assert task.num_labels == {"mnli": 3, "stsb": 1}.get(name, 2)
    assert task.metric == {"cola": "matthews", "stsb": "pearson"}.get(name, "accuracy")
    assert task.text_columns == (("sentence",) if name in ("cola", "sst2") else ("sentence1", "sentence2"))


def test_training_suites():
    assert get_task("math").train_file == "math_10k"
    assert get_task("commonsense").train_file == "commonsense_170k"
    assert get_task("commonsense_15k").train_file == get_task("commonsense_15k").test_file == "commonsense_15k"
    assert not get_task("commonsense_15k").tests_its_suite and get_task("boolq").tests_its_suite
    assert get_task("math_clean").train_file == "math_10k_clean"
    assert len(TASKS) == 8 + 7 + 8 + 4 + 2


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UserError, match=r"'multiarth'.*did you mean MultiArith"):
        get_task("multiarth")
    with pytest.raises(UserError, match="did you mean glue/sst2"):
        get_task("glue/sst-2")
    with pytest.raises(UserError, match=r"tasks: commonsense, .*glue/stsb"):
        get_task("????")


def test_baseline_is_the_majority_share_or_nothing():
    assert get_task("boolq").baseline(["true", "false", "true", "true"]) == 0.75
    assert get_task("AQuA").baseline(["A", "B", "B", "C"]) == 0.5
    assert get_task("gsm8k").baseline(["5.0", "5.0"]) == 0.0
    assert get_task("glue/cola").baseline(["1", "1"]) == 0.0


def test_the_baseline_of_the_eight_sets_at_once_knows_which_answers_a_prompt_names():
    golds = ["true", "true", "false", "solution2", "solution2", "solution1", "ending4", "option1", "answer3", "answer1"]
    assert get_task("commonsense_15k").baseline(golds) == (2 + 2 + 1 + 1 + 1) / 10
