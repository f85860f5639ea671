"""Check every data file under a folder: rows, duplicates, test questions that a training set gives away, lengths.

    python launch/check_data.py --data-dir data [--tokenizer models/smollm2-135m] [--json]
    python launch/check_data.py --data-dir data --clean math

A file that cannot be used is named with the row and the key, and the exit status is 2. --clean writes a training set
again without the questions of its suite's test sets, as one to train on: math as the task math_clean.
"""

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroada.command import run
from neuroada.errors import UserError
from neuroada.evaluation.results import write_atomically
from neuroada.tasks.data import SPLITS, load_examples, possible_files, question_key
from neuroada.tasks.encode import encode_prompts
from neuroada.tasks.table import TASKS, Example, Task, get_task

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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds <set>/{train,test}.json")
    parser.add_argument("--tokenizer", type=Path, help="folder of a model or tokenizer, for token lengths")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--clean", metavar="TASK", help="write TASK's training set without its suite's test questions")
    args = parser.parse_args(argv)
    if not args.data_dir.is_dir():
        raise UserError(f"--data-dir: {args.data_dir} is no folder; fetch data with launch/fetch.py")
    if args.clean:
        return clean(get_task(args.clean), args.data_dir)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None

    files: list[Checked] = []
    keys: list[list[str]] = []  # of each file, its questions reduced to [a-z0-9]
    problems: list[str] = []
    for task in TASKS.values():
        for split in SPLITS:
            if not any(path.is_file() for path in possible_files(task, split, args.data_dir)):
                continue
            try:
                examples = load_examples(task, split, args.data_dir)
            except UserError as problem:
                problems.append(str(problem))
                continue
            keys.append([question_key(example) for example in examples])
            files.append(check(task, split, examples, keys[-1], tokenizer))
    if not files and not problems:
        raise UserError(
            f"--data-dir: no set of the task table lies in {args.data_dir}; see docs/tasks.md for the names"
        )

    overlaps = find_overlaps(files, keys)
    if args.json:
        report = {"files": files, "contamination": overlaps, "problems": problems}
        print(json.dumps(report, default=asdict, indent=2))
    else:
        print_tables(files, overlaps)
    if problems:
        raise UserError(" | ".join(problems))


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
        if other.suite != task.suite or other.test_file is None:
            continue
        if any(path.is_file() for path in possible_files(other, "test", data_dir)):
            seen |= {question_key(example) for example in load_examples(other, "test", data_dir)}
        else:
            absent.append(other.name)
    if not seen:
        raise UserError(
            f"--clean {task.name}: {data_dir} holds no test set of the {task.suite} suite; "
            f"fetch them: python launch/fetch.py data {task.suite}"
        )
    kept = [example for example in examples if question_key(example) not in seen]
    if not kept:
        raise UserError(
            f"--clean {task.name}: every question stands in a test set, so nothing would be left to train on"
        )
    write_atomically(out, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
    print(f"{out}: {len(kept):,} of {len(examples):,} rows; train on it with task={cleaned.name}")
    if absent:
        print(f"not looked into, because they are not there: {', '.join(absent)}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"--tokenizer: {folder} is no folder; give one that holds a tokenizer.json")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer: {folder} holds no tokenizer ({error})") from None


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


def print_tables(files: list[Checked], overlaps: list[Overlap]) -> None:
    """The files; then of each held-out set, which training sets hold its questions and which of its suite do not."""
    from rich.console import Console
    from rich.table import Table

    with_tokens = any(file.tokens for file in files)
    table = Table("file", title="Files")
    for header in ("rows", "unique", "duplicates", *(f"p{p}" for p in PERCENTILES if with_tokens)):
        table.add_column(header, justify="right")
    for file in files:
        counts = [file.rows, file.unique_questions, file.duplicates, *(file.tokens or {}).values()]
        table.add_row(f"{file.set}/{file.split}", *(f"{count:,}" for count in counts))
    console = Console()
    console.print(table)
    if with_tokens:
        console.print("p50 to p100: tokens of prompt, target and EOS; in a test set of the prompt alone")

    contamination = Table("held-out set", "its questions in", "none in", title="Contamination")
    for held_out, group in itertools.groupby(overlaps, key=lambda overlap: overlap.test):
        pairs = list(group)
        found = [f"{pair.train} {pair.questions:,} ({pair.share:.1%})" for pair in pairs if pair.questions]
        clean = [pair.train for pair in pairs if pair.same_suite and not pair.questions]
        contamination.add_row(held_out, "\n".join(found), ", ".join(clean))
    if overlaps:
        console.print(contamination)


if __name__ == "__main__":
    run(main)
