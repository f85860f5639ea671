"""Generated problems: arithmetic, and the quick start's sums."""

import re

import pytest

from neuroada.errors import UserError
from neuroada.tasks import arithmetic
from neuroada.tasks.data import contamination, fingerprint, load_examples
from neuroada.tasks.table import get_task

TASK = get_task("arithmetic")


def test_the_same_everywhere():
    test = load_examples(TASK, "test", "nowhere")
    assert len(test) == 200
    assert fingerprint(test) == "bbb2aa3edf818dff69449cd96b15fb227c86e5d3c7ddc8809fa172fc8ca103d4"


def test_train_and_test_share_nothing():
    train, test = (load_examples(TASK, split, "nowhere") for split in ("train", "test"))
    assert len(train) == 20_000
    assert contamination(test, train) == set()
    assert len({row["instruction"] for row in test}) == 200
    # item i is drawn from seed + i: the two ranges of seeds are apart, whatever is skipped
    assert arithmetic.TEST_SEED - arithmetic.TRAIN_SEED > 2 * arithmetic.TRAIN_SIZE


def test_both_lengths_are_tested():
    terms = [row["instruction"].count("+") + row["instruction"].count("-") for row in load_examples(TASK, "test", ".")]
    assert 60 < terms.count(1) < 140
    assert terms.count(1) + terms.count(2) == 200


def test_answers_are_right():
    for row in load_examples(TASK, "test", "nowhere"):
        expression = row["instruction"].removeprefix("State the final answer to the following arithmetic problem: ")
        assert eval(expression.removesuffix(" =")) == int(row["answer"])
        assert TASK.prompt(row) == row["instruction"] + "\n"
        assert TASK.sound(TASK.target(row), row["answer"]).correct
        assert TASK.published(TASK.target(row), row["answer"]).correct


def test_sums_are_of_two_numbers():
    sums = get_task("sums")
    train, test = (load_examples(sums, split, "nowhere") for split in ("train", "test"))
    assert all(len(re.findall(r"\d+", row["instruction"])) == 2 for row in (*train, *test))
    assert (len(train), len(test)) == (20_000, 200)
    assert contamination(test, train) == set()
    assert fingerprint(test) == "8a8e087c130fcb53291e6c2259a881b45ddce6b4413a144ed14daa8e6847958b"


def test_no_validation_split():
    with pytest.raises(UserError, match="no split 'validation'"):
        load_examples(TASK, "validation", "nowhere")
