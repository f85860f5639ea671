"""Reading answers: golden cases of both rules, and the counts on the worked solutions of math_10k."""

import pytest

from neuroada.tasks import scoring
from neuroada.tasks.data import load_examples
from neuroada.tasks.table import get_task

# ---- one of a few words


@pytest.mark.parametrize(
    ("generation", "published", "sound"),
    [
        ("the correct answer is answer2", "answer2", "answer2"),
        ("the correct answer is answer2.", "answer2.", "answer2"),
        ("the correct answer is  answer2\n", "answer2", "answer2"),
        ("The correct answer is Answer2!", None, "answer2"),
        ("the correct answer is: answer2", None, "answer2"),
        ("the correct answer is answer2\nthe correct answer is answer3", ..., "answer2"),  # never stops
        ("the correct answer is answer2answer3", "answer2answer3", None),  # inside a word
        ("the correct answer is answer22", "answer22", None),
        ("the correct answer is answer7", "answer7", None),
        ("answer2", None, "answer2"),
        ("It must be answer2, so answer2.", None, "answer2"),
        ("Answer1: dry palms Answer2: wet palms", None, None),  # an echo of the question
        ("", None, None),
        ("\n\n\n", None, None),
    ],
)
def test_choice(generation, published, sound):
    task = get_task("openbookqa")
    if published is not ...:
        assert task.published.read(generation) == published
    assert task.published(generation, "answer2").correct == (published == "answer2")
    assert task.sound(generation, "answer2").answer == sound
    assert task.sound(generation, "answer2").correct == (sound == "answer2")


def test_choice_not_inside_words():
    task = get_task("boolq")
    assert task.sound.read("untrue") is None
    assert task.sound.read("the correct answer is truely") is None
    assert task.sound.read("The answer is FALSE; it is not true.") == "false"


# ---- numbers


@pytest.mark.parametrize(
    ("generation", "published", "sound"),
    [
        ("The answer is 15.", 15, 15),
        ("so 3 + 4 = 7", 7, 7),
        ("-10", -10, -10),
        ("The answer is −10.", 10, -10),  # U+2212
        ("She owes -$3.50.", 3.5, -3.5),
        ("She owes $-3.50.", -3.5, -3.5),
        ("In total 1,234 books", 1234, 1234),
        ("$1,234,567.89", 1234567.89, 1234567.89),
        ("either 1, 2,3", 23, 3),  # a list is no thousands
        ("It costs $5.", 5, 5),
        ("about 25%", 25, 25),
        ("12km", 12, 12),
        ("5 apples", 5, 5),
        ("3/4", 4, 0.75),
        ("The answer is 3/4 of a pie", 4, 0.75),
        ("The answer is 2 1/2 hours", 2, 2.5),
        ("4/0", 0, None),
        ("0.6666666667", 0.6666666667, 0.6666666667),
        (".5", 5, 0.5),
        ("10-3", -3, 3),  # a subtraction has no negative number
        ("(4)-3", -3, 3),
        ("The total is 8 for x2 and y3", 3, 8),  # digits inside words
        ("There are 8 of them, counting the 3rd", 3, 8),
        ("There are 8 cases of covid-19", -19, 8),
        ("The answer is 3 + 4 = 7 apples. Check: 7 - 4 = 3", 3, 7),
        ("The answer is 7. (Kim had 9.)", 9, 7),
        ("The answer in Arabic numerals is:\n\n16", 16, 16),
        ("The answer is:\n\n1 notebook lasts 4 days.", 4, 4),
        ("Answer: **42**", 42, 42),
        ("the answer is $\\$18$", 18, 18),
        ("The answer is 5.\n\n### Instruction:\nTom has 9 hats", 9, 5),  # never stops
        ("5 apples\n\n### Instruction:\nTom has 9 hats", 9, 5),
        ("The answer is 5. The answer is 5. The ans", 5, 5),
        ("no digits at all", None, None),
        ("", None, None),
    ],
)
def test_number(generation, published, sound):
    task = get_task("gsm8k")
    for rule, expected in ((task.published, published), (task.sound, sound)):
        read = rule.read(generation)
        assert (None if read is None else float(read)) == expected
        assert not rule(generation, "100000").correct
        if expected is not None:
            assert rule(generation, str(expected)).correct


@pytest.mark.parametrize(("gold", "right"), [("15.0", True), ("15.0009", True), ("15.002", False), ("B", False)])
def test_numbers_agree_within_a_thousandth(gold, right):
    for rule in (get_task("gsm8k").published, get_task("gsm8k").sound):
        assert rule("The answer is 15", gold).correct is right


def test_number_of_a_whole_text():
    assert [scoring.number(text) for text in ("-3.5", "1,234", "3/4", " 7 ")] == [-3.5, 1234, 0.75, 7]
    assert [scoring.number(text) for text in ("answer9", "B", "", "7 apples", "1/0", "-")] == [None] * 6


def test_bare_sum_is_read_from_the_first_line_with_a_number():
    rule = get_task("arithmetic").sound
    assert rule("-11\n\nState the final answer to 15 - 26 =", "-11").correct
    assert rule("\n15 - 26 = -11\n12", "-11").correct
    assert rule("", "-11").answer is None


# ---- letters


@pytest.mark.parametrize(
    ("generation", "published", "sound"),
    [
        ("The answer is (C).", "C", "C"),
        ("Because 3 is odd, the answer is D.", "B", "D"),  # inside a word
        ("Adding them: option B", "A", "B"),
        ("EACH", "E", None),
        ("the answer is c", None, None),
        ("The answer is B.\n\n### Instruction:\nA) 1 B) 2 C) 3", "B", "B"),  # never stops
        ("", None, None),
    ],
)
def test_letter(generation, published, sound):
    task = get_task("AQuA")
    assert task.published.read(generation) == published
    assert task.sound.read(generation) == sound


# ---- counts on real worked solutions


def test_counts_on_math_10k(shared_data):
    rows = load_examples(get_task("math"), "train", shared_data / "llm_adapters")
    letters = [row for row in rows if row["answer"] in "ABCDE"]
    numbers = [row for row in rows if row["answer"] not in "ABCDE"]

    def right(rule, rows):
        return sum(rule(row["output"], row["answer"]).correct for row in rows)

    aqua, gsm8k = get_task("AQuA"), get_task("gsm8k")
    assert (len(letters), right(aqua.published, letters), right(aqua.sound, letters)) == (713, 371, 688)
    assert (len(numbers), right(gsm8k.published, numbers)) == (9206, 9206)
    assert right(gsm8k.sound, numbers) == 9202  # the other four hedge: "$1000 or $800"


@pytest.mark.parametrize("name", ["gsm8k", "AddSub", "SingleEq", "MultiArith"])
def test_gold_answers_are_right_when_said(shared_data, name):
    task = get_task(name)
    for row in load_examples(task, "test", shared_data / "llm_adapters"):
        for rule in (task.published, task.sound):
            assert rule(f"So the answer is {row['answer']}.", row["answer"]).correct
