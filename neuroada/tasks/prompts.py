"""The two halves of a training sequence, in the authors' wording: what the model is given and what it has to say."""

from collections.abc import Mapping

MATH_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
COMMONSENSE_TRIGGER = "the correct answer is "


def instruction_line(example: Mapping[str, str]) -> str:
    """The instruction alone on its line: commonsense tasks, whose instruction ends in the list of allowed answers."""
    return example["instruction"] + "\n"


def instruction_template(example: Mapping[str, str]) -> str:
    """The Alpaca template without input: arithmetic word problems."""
    return MATH_PROMPT.format(instruction=example["instruction"])


def trigger_and_answer(example: Mapping[str, str]) -> str:
    """ "the correct answer is answer2" """
    return COMMONSENSE_TRIGGER + example["answer"]


def output(example: Mapping[str, str]) -> str:
    """The worked solution of a training row. Arithmetic test sets hold old, often wrong generations here."""
    return example["output"]


def answer(example: Mapping[str, str]) -> str:
    """The bare answer."""
    return example["answer"]
