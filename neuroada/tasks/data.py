"""From a task and a split to its examples, every row checked; and what two sets have in common."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroada.errors import UserError
from neuroada.files import read_json, read_json_lines
from neuroada.tasks import glue

if TYPE_CHECKING:
    from neuroada.tasks.table import Example, Task

SPLITS = ("train", "validation", "test", "validation_mismatched")

MAX_DATA = 4 << 30  # bytes of a data file


def load_examples(task: Task, split: str, data_dir: str | Path) -> list[Example]:
    """The examples of `split` (one of SPLITS) of `task`, in the order of the file.

    UserError naming the file, the row (counted from 1) and the key: a missing or malformed file, no rows, a row that is
    no object, a key that is missing or no string, an answer that the task cannot have.
    """
    if task.generate:
        return list(task.generate(split))
    path = find_file(task, split, data_dir)
    examples: list[Example] = [
        _checked(task, split, row, f"{path}, row {number}") for number, row in enumerate(_read(path, task.name), 1)
    ]
    if not examples:
        raise UserError(f"{path}: no rows; give it at least one")
    return examples


def find_file(task: Task, split: str, data_dir: str | Path) -> Path:
    """The file that holds `split` of `task`: `<split>.json`, or .jsonl, or an original GLUE file. UserError if none."""
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    candidates = possible_files(task, split, data_dir)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if candidates:
        how = f"fetch it: python launch/fetch.py data {candidates[0].parent.relative_to(data_dir)}"
        if task.name.endswith("_clean"):
            source = task.name.removesuffix("_clean")
            how = f"write it: python launch/check_data.py --data-dir {data_dir} --clean {source}"
        raise UserError(f"{candidates[0]}: no such file, the {split} set of task {task.name}; check data_dir, or {how}")
    if task.suite == "glue":
        raise UserError(f"task {task.name} has no labelled test set; score its validation split")
    what = "test set: it only trains" if split == "test" else "training set of its own: it is only scored"
    raise UserError(f"task {task.name} has no {what}; choose another task of the {task.suite} suite")


def possible_files(task: Task, split: str, data_dir: str | Path) -> list[Path]:
    """Where `split` of `task` may lie, the preferred place first; [] if the task has no such split."""
    folder = task.test_file if split == "test" else task.train_file
    if folder is None:
        return []
    base, split = Path(data_dir) / folder, task.test_split if split == "test" else split
    original = glue.tsv_file(task.name, split, Path(data_dir))
    return [base / f"{split}.json", base / f"{split}.jsonl", *([original] if original else [])]


def _read(path: Path, name: str) -> list[Any]:
    if path.suffix == ".tsv":
        return glue.read_tsv(path, name)
    if path.suffix == ".jsonl":
        return read_json_lines(path, limit=MAX_DATA)
    rows = read_json(path, limit=MAX_DATA, remedy="write a list of objects")
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}, expected a list of objects")
    return rows


def _checked(task: Task, split: str, row: Any, where: str) -> dict[str, str]:
    """`row` as an Example of `task`: its columns and no other."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, expected an object with {', '.join(task.columns)}")
    row = task.from_row(row)
    example: dict[str, str] = {}
    for column in task.columns:
        if column not in row:
            raise UserError(f"{where}: key {column!r} is missing; a row has {', '.join(task.columns)}")
        value = row[column]
        if not isinstance(value, str):
            raise UserError(f"{where}: {column} is {json.dumps(value)[:100]}, expected a string")
        example[column] = value
    gold = example[task.answer_column]
    if not _question(example).strip():
        raise UserError(f"{where}: {task.columns[0]} is empty, expected the question")
    if not task.answers.allow(gold):
        raise UserError(
            f"{where}: {task.answer_column} is {gold!r}, expected {task.answers.wording} (task {task.name})"
        )
    if split != "test" and not task.target(example).strip():
        raise UserError(f"{where}: nothing to learn, the text to answer with (output) is empty")
    return example


# ---- what sets have in common


def question_key(example: Example) -> str:
    """The question reduced to [a-z0-9], the same for two spellings of it; unreduced where nothing would be left."""
    text = _question(example)
    return re.sub("[^a-z0-9]", "", text.lower()) or text


def _question(example: Example) -> str:
    return "".join(value for column, value in example.items() if column not in ("output", "answer", "label"))


def contamination(test_examples: Sequence[Example], train_examples: Iterable[Example]) -> set[int]:
    """The indices (from 0) of the test examples whose question is a training question too, by `question_key`."""
    seen = {question_key(example) for example in train_examples}
    return {i for i, example in enumerate(test_examples) if question_key(example) in seen}


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 (hex) of the content and order of `examples`."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
