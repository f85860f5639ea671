"""The table of tasks: one row each, and nothing about a task stands anywhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Example = Mapping[str, str]
"""One question in LLM-Adapters' form: instruction, input, output, answer; all strings."""


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
class Task:
    """A row of the table.

    `prompt` and `target` make the two halves of a training sequence; the tokenizer's EOS follows the target.
    `published` is the authors' rule to the letter, `sound` the one to believe; both give a Verdict.
    """

    name: str
    suite: str  # commonsense | math | arithmetic | glue
    prompt: Callable[[Example], str]
    target: Callable[[Example], str]
    published: Rule
    sound: Rule
    max_new_tokens: int
    train_file: str | None = None  # folder under data_dir that holds train.json; None: nothing to train on
    test_file: str | None = None  # folder under data_dir that holds test.json; None: nothing to score
