"""The table of tasks: one row each, and nothing about a task stands anywhere else."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from neuroada.errors import UserError
from neuroada.tasks import arithmetic, glue, prompts, rows, scoring

Example = Mapping[str, Any]
"""One question in LLM-Adapters' form: instruction, input, output, answer; all strings. GLUE: texts and label. Of a task
file: prompt, answer, and, where it has them, system and options, a list of strings."""

OWN = "own"
"""The suite of tasks that a file describes (neuroada/data/task_file.py)."""

HARNESS = "lm_eval:"
"""What the name of a task of lm-evaluation-harness begins with (neuroada/evaluation/harness.py)."""


@dataclass(frozen=True)
class Verdict:
    """What one rule read out of a generation, and whether that is the right answer."""

    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Rule:
    """How an answer is read from a generation and compared with the gold one."""

    read: Callable[[str], str | None]
    equal: Callable[[str, str], bool]

    def __call__(self, generation: str, gold: str) -> Verdict:
        answer = self.read(generation)
        return Verdict(answer, answer is not None and self.equal(answer, gold))


@dataclass(frozen=True)
class Answers:
    """The gold answers a task allows; a row with any other is refused when it is loaded."""

    wording: str  # for the message: "answer is '7', not one of A, B, C, D, E"
    allow: Callable[[str], bool]


@dataclass(frozen=True)
class MultipleChoice:
    """The answer is not generated: it is the option to which the model gives the highest log-probability."""

    options: Callable[[Example], Sequence[str]]
    length_normalised: bool  # compared per token, not summed over an option's tokens


@dataclass(frozen=True)
class ChatForm:
    """The prompt is a user's turn of a chat, after the example's "system" turn, if it has one."""

    template: str  # tokenizer: the model's own; or the path of a .jinja file
    field: str  # what names it, for messages


@dataclass(frozen=True)
class Task:
    """A row of the table.

    `prompt` and `target` make the two halves of a training sequence; the tokenizer's EOS follows the target.
    `published` is the authors' rule to the letter, `sound` the one to believe; both give a Verdict.
    """

    name: str
    suite: str  # commonsense | math | arithmetic | sums | glue | own
    prompt: Callable[[Example], str]
    target: Callable[[Example], str]
    published: Rule
    sound: Rule
    max_new_tokens: int
    answers: Answers
    baseline: Callable[[Sequence[str]], float]  # gold answers -> the score of an answer that ignores the question
    objective: str = "causal_lm"  # how a model learns it: causal_lm | classification, or a registered one
    train_file: str | None = None  # folder under data_dir that holds train.json; None: nothing to train on
    test_file: str | None = None  # folder under data_dir that holds test.json; None: nothing to score
    test_split: str = "test"  # the file there; validation: a part of the training set, and no test of the suite
    columns: tuple[str, ...] = ("instruction", "input", "output", "answer")  # every row has them, all strings
    answer_column: str = "answer"
    from_row: Callable[[dict[str, Any]], dict[str, Any]] = rows.unchanged  # a row as the file has it -> `columns`
    generate: Callable[[str], Sequence[Example]] | None = None  # split -> examples, instead of files
    multiple_choice: MultipleChoice | None = None  # None: answers are generated
    chat: ChatForm | None = None  # of a task file; None: the model is given the prompt as it stands
    version: str | None = None  # of a task file: a hash of all that decides a score
    # classification with an encoder (suite glue) alone
    text_columns: tuple[str, ...] = ()  # what the encoder reads: one sentence or a pair
    num_labels: int = 0  # 1: regression
    metric: str = "accuracy"  # accuracy | matthews | pearson
    mismatched: str | None = None  # a second validation split, of other sources, reported beside the first

    @property
    def tests_its_suite(self) -> bool:
        """Whether it is one of the tests that the suite's name stands for."""
        return self.test_file is not None and self.test_split == "test"


def one_of(*choices: str) -> Answers:
    """Answers that are one of `choices` to the character."""
    return Answers(f"one of {', '.join(choices)}", frozenset(choices).__contains__)


NUMBER = Answers("a number", lambda text: scoring.number(text) is not None)
LETTER = one_of("A", "B", "C", "D", "E")
NUMBER_OR_LETTER = Answers("a number or one of A to E", lambda text: NUMBER.allow(text) or LETTER.allow(text))


def _commonsense(name: str, choices: Sequence[str], train_file: str, test_file: str | None) -> Task:
    return Task(
        name=name,
        suite="commonsense",
        prompt=prompts.instruction_line,
        target=prompts.trigger_and_answer,
        published=Rule(scoring.published_choice, scoring.same_text),
        sound=Rule(scoring.sound_choice(choices), scoring.same_text),
        max_new_tokens=32,
        answers=one_of(*choices),
        baseline=scoring.majority_by_kind,
        train_file=train_file,
        test_file=test_file,
    )


def _math(name: str, train_file: str | None, test_file: str | None, answers: Answers = NUMBER) -> Task:
    return Task(
        name=name,
        suite="math",
        prompt=prompts.instruction_template,
        target=prompts.output,
        published=Rule(scoring.published_number, scoring.same_number),
        sound=Rule(scoring.sound_number, scoring.same_number),
        max_new_tokens=512,
        answers=answers,
        baseline=scoring.zero,
        train_file=train_file,
        test_file=test_file,
    )


def _generated(name: str, max_terms: int) -> Task:
    return replace(
        _math(name, None, None),
        suite=name,
        prompt=prompts.instruction_line,
        target=prompts.answer,
        sound=Rule(scoring.first_line_number, scoring.same_number),
        max_new_tokens=16,
        generate=partial(arithmetic.generate, max_terms=max_terms),
    )


def _glue(name: str, text_columns: tuple[str, ...], num_labels: int, metric: str = "accuracy") -> Task:
    labels = one_of(*map(str, range(num_labels)))
    exact = Rule(str.strip, scoring.same_text)
    return Task(
        name=f"glue/{name}",
        suite="glue",
        objective="classification",
        prompt=lambda example: "\n".join(example[column] for column in text_columns) + "\n",
        target=lambda example: example["label"],
        published=exact,
        sound=exact,
        max_new_tokens=0,
        answers=Answers("a number from 0 to 5", glue.similarity) if num_labels == 1 else labels,
        baseline=scoring.majority if metric == "accuracy" else scoring.zero,
        train_file=f"glue/{name}",
        columns=(*text_columns, "label"),
        answer_column="label",
        from_row=glue.from_row,
        text_columns=text_columns,
        num_labels=num_labels,
        metric=metric,
    )


_CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),  # a few questions do have five
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
_EVERY_CHOICE = tuple(sorted({choice for choices in _CHOICES.values() for choice in choices}))
_SINGLE, _PAIR = ("sentence",), ("sentence1", "sentence2")

_ROWS = [
    # Sets to train on; their tests are the tasks of the same suite, and of commonsense_15k also the rest of the set.
    _commonsense("commonsense", _EVERY_CHOICE, "commonsense_170k", None),
    replace(
        _commonsense("commonsense_15k", _EVERY_CHOICE, "commonsense_15k", "commonsense_15k"), test_split="validation"
    ),
    _math("math", "math_10k", None, NUMBER_OR_LETTER),
    _math("math_clean", "math_10k_clean", None, NUMBER_OR_LETTER),  # by `neuroada check-data --clean` math
    *(_commonsense(name, choices, name, name) for name, choices in _CHOICES.items()),
    *(_math(name, None, name) for name in ("MultiArith", "AddSub", "SingleEq", "SVAMP", "mawps")),
    replace(_math("gsm8k", "gsm8k", "gsm8k"), from_row=rows.from_gsm8k),
    replace(
        _math("AQuA", None, "AQuA", LETTER),
        published=Rule(scoring.published_letter, scoring.same_text),
        sound=Rule(scoring.sound_letter, scoring.same_text),
        baseline=scoring.majority,
    ),
    # No download.
    _generated("arithmetic", max_terms=3),
    _generated("sums", max_terms=2),
    _glue("cola", _SINGLE, 2, "matthews"),
    replace(_glue("mnli", _PAIR, 3), mismatched="validation_mismatched"),
    _glue("mrpc", _PAIR, 2),
    _glue("qnli", _PAIR, 2),
    _glue("qqp", _PAIR, 2),
    _glue("rte", _PAIR, 2),
    _glue("sst2", _SINGLE, 2),
    _glue("stsb", _PAIR, 1, "pearson"),
]
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def is_task_file(name: str) -> bool:
    """Whether the name of a task is the path of a file that describes one."""
    return name.endswith((".yaml", ".yml"))


def get_task(name: str) -> Task:
    """The row called `name`, of this table or of an installed package (an entry point of the group neuroada.tasks).

    UserError with the nearest names if there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if is_task_file(name):
        raise UserError(
            f"task = {name}: a task file is for evaluate.tasks and --tasks; to train on files of your own, give data"
        )
    for entry in entry_points(group="neuroada.tasks", name=name):
        return entry.load()
    lower = {known.lower(): known for known in TASKS}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"tasks: {', '.join(TASKS)}"
    raise UserError(f"task: there is no task {name!r}; {hint}")
