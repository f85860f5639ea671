"""What is in the data files: rows, duplicates, lengths, and test questions that a training set gives away."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import write_text
from neuroada.tasks.data import SPLITS, load_examples, possible_files, question_key
from neuroada.tasks.encode import encode_prompts
from neuroada.tasks.table import TASKS, Example, Task

PERCENTILES = (50, 95, 99, 100)


@dataclass
class Checked:
    """One file. `tokens`: percentile -> tokens of prompt + target + EOS (of the prompt, in a test set)."""

    set: str
    split: str
    suite: str
    rows: int
    unique_questions: int
    duplicates: int
    tokens: dict[str, int] | None


@dataclass
class Overlap:
    """How many questions of a test or validation set stand in a training set too."""

    test: str
    train: str
    questions: int
    share: float
    same_suite: bool


@dataclass
class Report:
    files: list[Checked]
    contamination: list[Overlap]
    problems: list[str]


def check_folder(data_dir: Path, tokenizer: Any) -> Report:
    """Check every file of the task table's sets under `data_dir`. `tokenizer`: None: no token lengths."""
    files: list[Checked] = []
    keys: list[list[str]] = []  # of each file, its questions reduced to [a-z0-9]
    problems: list[str] = []
    for task in TASKS.values():
        for split in SPLITS:
            if split == "test" and task.test_split != "test":
                continue  # a file that is checked as what it is
            if not any(map(os.path.lexists, possible_files(task, split, data_dir))):  # a dead link is a problem
                continue
            try:
                examples = load_examples(task, split, data_dir)
            except UserError as problem:
                problems.append(str(problem))
                continue
            if not examples:
                problems.append(f"{possible_files(task, split, data_dir)[0]}: holds no rows")
                continue
            keys.append([question_key(example) for example in examples])
            files.append(check(task, split, examples, keys[-1], tokenizer))
    if not files and not problems:
        raise UserError(f"--data-dir: no set of the task table lies in {data_dir}; see docs/tasks.md for the names")
    return Report(files, find_overlaps(files, keys), problems)


def check(task: Task, split: str, examples: list[Example], keys: list[str], tokenizer: Any) -> Checked:
    """Count what is in one file."""
    unique = len(set(keys))
    tokens = token_percentiles(task, split, examples, tokenizer) if tokenizer else None
    folder = task.test_file if split == "test" else task.train_file
    return Checked(str(folder), split, task.suite, len(keys), unique, len(keys) - unique, tokens)


def token_percentiles(task: Task, split: str, examples: list[Example], tokenizer: Any) -> dict[str, int]:
    """Percentile -> tokens of prompt + target + EOS, or of the prompt alone in a test set."""
    import numpy as np

    target_and_eos = split != "test"
    texts = [task.prompt(example) + (task.target(example) if target_and_eos else "") for example in examples]
    lengths = [len(ids) + target_and_eos for ids in encode_prompts(texts, tokenizer)]
    values = np.percentile(lengths, PERCENTILES, method="higher")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def find_overlaps(files: list[Checked], keys: list[list[str]]) -> list[Overlap]:
    """Every test and validation set against every training set."""
    overlaps = []
    for test, questions in zip(files, keys, strict=True):
        if test.split == "train":
            continue
        for train, seen in zip(files, map(set, keys), strict=True):
            if train.split == "train":
                found = sum(key in seen for key in questions)
                same = test.suite == train.suite
                overlaps.append(
                    Overlap(f"{test.set}/{test.split}", train.set, found, found / len(questions), same_suite=same)
                )
    return overlaps


def clean(task: Task, data_dir: Path) -> None:
    """Write the training set of the task called `task`_clean: the rows whose question stands in no test set."""
    cleaned = TASKS.get(f"{task.name}_clean")
    if cleaned is None:
        known = ", ".join(name.removesuffix("_clean") for name in TASKS if name.endswith("_clean"))
        raise UserError(f"--clean {task.name}: the task table has no {task.name}_clean; choose from {known}")
    out = possible_files(cleaned, "train", data_dir)[0]
    if out.exists():
        raise UserError(f"--clean {task.name}: {out} is already there; remove it to write it again")
    examples = load_examples(task, "train", data_dir)
    seen: set[str] = set()
    absent = []
    for other in TASKS.values():
        if other.suite != task.suite or not other.tests_its_suite:
            continue
        if any(map(os.path.lexists, possible_files(other, "test", data_dir))):
            seen |= {question_key(example) for example in load_examples(other, "test", data_dir)}
        else:
            absent.append(other.name)
    if not seen:
        raise UserError(
            f"--clean {task.name}: {data_dir} holds no test set of the {task.suite} suite; "
            f"fetch them: neuroada fetch data {task.suite}"
        )
    kept = [example for example in examples if question_key(example) not in seen]
    if not kept:
        raise UserError(
            f"--clean {task.name}: every question stands in a test set, so nothing would be left to train on"
        )
    write_text(out, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
    print(f"{out}: {len(kept):,} of {len(examples):,} rows; train on it with task={cleaned.name}")
    if absent:
        print(f"not looked into, because they are not there: {', '.join(absent)}")
