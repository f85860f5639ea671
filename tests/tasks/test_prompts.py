"""Golden prompts and targets, on literal rows and on the first real row of every set."""

import pytest

from neuroada.tasks.data import load_examples
from neuroada.tasks.table import get_task

MATH = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


def example(instruction, output, answer):
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def test_hellaswag():
    row = example(
        "Please choose the correct ending to complete the given sentence: Grooming dog: Women are holding dogs on "
        "tables.\n\nEnding1: two other women. Ending2: people are standing. Ending3: a young woman. Ending4: people."
        "\n\nAnswer format: ending1/ending2/ending3/ending4",
        "the correct answer is ending3",
        "ending3",
    )
    task = get_task("hellaswag")
    assert task.prompt(row).endswith("Answer format: ending1/ending2/ending3/ending4\n")
    assert task.target(row) == "the correct answer is ending3"


def test_winogrande():
    row = example(
        "Please choose the correct answer to fill in the blank to complete the given sentence: The tattoo would not "
        "work on his arm, but was great on his chest, as the _ was wide enough for the artwork.\n\nOption1: arm "
        "Option2: chest Answer format: option1/option2",
        "the correct answer is option2",
        "option2",
    )
    task = get_task("winogrande")
    assert task.prompt(row) == row["instruction"] + "\n"
    assert task.target(row) == "the correct answer is option2"


@pytest.mark.parametrize("name", ["SVAMP", "mawps", "math"])
def test_math(name):
    row = example(
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack How much do you have "
        "to pay to buy each pack?",
        "76 - 25 = 51. The answer is 51.",
        "51.0",
    )
    task = get_task(name)
    assert task.prompt(row) == MATH.format(row["instruction"])
    assert task.target(row) == row["output"]


def test_braces_in_an_instruction_stay():
    assert "{x}" in get_task("math").prompt(example("Solve {x}", "1", "1"))


def test_glue_pair():
    row = {"sentence1": "No.", "sentence2": "Yes.", "label": "0"}
    assert get_task("glue/rte").prompt(row) == "No.\nYes.\n"


REAL_COMMONSENSE = {
    "boolq": ("Please answer the following question with true or false, question: does ethanol take more", "false"),
    "piqa": ("Please choose the correct solution to the question: How do I ready a guinea pig cage", "solution1"),
    "social_i_qa": ("Please choose the correct answer to the question: Tracy didn't go home that", "answer3"),
    "ARC-Easy": ("Please choose the correct answer to the question: Which statement best explains why", "answer1"),
    "ARC-Challenge": ("Please choose the correct answer to the question: An astronomer observes that", "answer3"),
    "openbookqa": ("Please choose the correct answer to the question: A person wants to start saving", "answer2"),
}


@pytest.mark.parametrize("name", REAL_COMMONSENSE)
def test_real_commonsense_rows(shared_data, name):
    task = get_task(name)
    examples = load_examples(task, "test", shared_data / "llm_adapters")
    start, answer = REAL_COMMONSENSE[name]
    assert task.prompt(examples[0]).startswith(start)
    assert task.prompt(examples[0]) == examples[0]["instruction"] + "\n"
    assert task.target(examples[0]) == f"the correct answer is {answer}"
    for row in examples:  # the file's own output is what we make of its answer
        assert task.target(row) == row["output"]
        for rule in (task.published, task.sound):
            assert rule(task.target(row), row["answer"]).correct


REAL_MATH = {
    "MultiArith": (" At the schools book fair Sam bought 13 adventure books", "15.0"),
    "AddSub": ("There are 7 crayons in the drawer . Mary took 3 crayons", "4"),
    "SingleEq": ("Oceanside Bike Rental Shop charges 17 dollars plus 7", "9.0"),
    "gsm8k": ("Mr Boarden is remodeling his bathroom.", "576.0"),
    "AQuA": ("Roberts has a property worth of $1023.65.", "A"),
}


@pytest.mark.parametrize("name", REAL_MATH)
def test_real_math_rows(shared_data, name):
    task = get_task(name)
    first = load_examples(task, "test", shared_data / "llm_adapters")[0]
    start, answer = REAL_MATH[name]
    assert first["instruction"].startswith(start)
    assert first["answer"] == answer
    assert task.prompt(first) == MATH.format(first["instruction"])
    for rule in (task.published, task.sound):
        assert rule(f"the answer is {answer}", answer).correct


def test_real_mixed_rows(shared_data):
    """hellaswag's and winogrande's rows stand in commonsense_15k."""
    task = get_task("commonsense_15k")
    examples = load_examples(task, "train", shared_data / "llm_adapters")
    answers = {row["answer"] for row in examples}
    assert {"ending1", "ending4", "option1", "option2", "true", "solution1", "answer5"} <= answers
    for row in examples:
        assert task.target(row) == row["output"]
        assert task.sound(task.target(row), row["answer"]).correct
