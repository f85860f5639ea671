"""From a task file to a row of the task table: its questions read from data of any kind, every one of them checked."""

import glob
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from neuroada.config.data import Dataset
from neuroada.config.task_file import AnswerRule, TaskFile
from neuroada.data.chat import read_template
from neuroada.data.sources import find_source
from neuroada.errors import UserError
from neuroada.files import check_schema, read_yaml
from neuroada.tasks import scoring
from neuroada.tasks.table import OWN, TASKS, Answers, ChatForm, Example, MultipleChoice, Rule, Task

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def load_task(path: str) -> Task:
    """The task that the YAML file `path` describes. Its questions are read and checked here, once.

    UserError naming the file, and of a question its file and row: a field that does not fit, a built-in task's name, no
    such data or template, a column that is missing or holds no text, an answer that the rule cannot find right.
    """
    spec = check_schema(TaskFile, read_yaml(Path(path), remedy="give a task file, or a task's name"), path)
    name = spec.name or Path(path).stem
    if name in TASKS:
        raise UserError(f"{path}: name = {name!r}: is a built-in task's; set another name")
    if spec.name is None:
        check_schema(TaskFile, {**spec.model_dump(exclude_unset=True), "name": name}, path, "set name")
    examples = _read_examples(spec, path)
    chat = ChatForm(spec.chat_template, f"{path}: chat_template") if spec.chat_template else None
    template = read_template(chat.template, chat.field) if chat else None
    decides = [spec.model_dump(exclude={"name", "path", "chat_template"}), template or spec.chat_template, examples]
    answer = spec.answer
    choice = MultipleChoice(lambda example: example["options"], answer.length_normalised) if answer.options else None
    rule = _rule(answer)
    return Task(
        name=name,
        suite=OWN,
        prompt=lambda example: example["prompt"],
        target=lambda example: example["answer"],
        published=rule,
        sound=rule,
        max_new_tokens=0 if choice else spec.max_new_tokens,
        answers=Answers("the target", lambda text: True),  # every row has been checked by now
        baseline=scoring.majority,
        generate=lambda split: examples,
        multiple_choice=choice,
        chat=chat,
        version=hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16],
    )


# ---- questions


def _read_examples(spec: TaskFile, path: str) -> list[Example]:
    parts = {"prompt": _parts(spec.prompt, f"{path}: prompt"), "answer": _parts(spec.target, f"{path}: target")}
    if spec.system is not None:
        parts["system"] = _parts(spec.system, f"{path}: system", plain=True)
    examples = []
    for source in [spec.path] if isinstance(spec.path, str) else spec.path:
        for row in find_source(_dataset(spec, source), field=f"{path}: path").rows():
            try:
                if row.error is not None or not isinstance(row.values, dict):
                    raise _RowError(row.error or f"is {json.dumps(row.values)[:60]}, expected an object")
                examples.append(_example(spec, parts, row.values))
            except _RowError as error:
                raise UserError(f"{row.where}: {error} (task file {path})") from None
    if not examples:
        raise UserError(f"{path}: path: {spec.path} holds no row; there is nothing to score")
    return examples


def _dataset(spec: TaskFile, path: str) -> Dataset:
    """One of its paths as data are given in a recipe. A file has no splits: there `find_source` wants the default."""
    one_file = Path(path).expanduser().is_file() or glob.has_magic(path)
    split = spec.split or ("train" if one_file else "test")
    return Dataset(path=path, name=spec.config, split=split, revision=spec.revision)


def _example(spec: TaskFile, parts: Mapping[str, Sequence[str]], row: Mapping[str, Any]) -> Example:
    example: dict[str, Any] = {field: _fill(of, row) for field, of in parts.items()}
    example["answer"] = example["answer"].strip()
    if not example["prompt"].strip():
        raise _RowError("the prompt is empty, expected a question")
    if not example["answer"]:
        raise _RowError("the target is empty, expected the right answer")
    if spec.answer.rule == "number" and scoring.number(example["answer"]) is None:
        raise _RowError(f"the target is {example['answer'][:60]!r}, expected a number")
    if spec.answer.options is not None:
        example["options"] = _options(row, spec.answer.options)
        example["answer"] = _right_option(example["options"], example["answer"], spec.answer)
    return example


def _options(row: Mapping[str, Any], column: str) -> list[str]:
    options = _value(row, column)
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise _RowError(f"column {column!r} is {_shown(options)}, expected a list of at least two texts")
    if any(not option.strip() for option in options):
        raise _RowError(f"column {column!r} holds an empty option; fill it, or remove it")
    if len(set(options)) < len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise _RowError(f"column {column!r} holds {twice[:60]!r} twice; which one is right cannot be told")
    return options


def _right_option(options: list[str], target: str, answer: AnswerRule) -> str:
    """The option that `target` names."""
    if answer.target_is == "text":
        found = [option for option in options if option.strip() == target]
        if len(found) == 1:
            return found[0]
        raise _RowError(
            f"the target is {target[:60]!r}, none of {_shown(options)}; set answer.target_is if it is an index"
        )
    if answer.target_is == "letter":
        place = ascii_uppercase.find(target.upper()) if len(target) == 1 else -1
    else:
        place = int(target) - (answer.target_is == "number") if re.fullmatch(r"\d{1,6}", target, re.ASCII) else -1
    if not 0 <= place < len(options):
        raise _RowError(
            f"the target is {target[:60]!r}, expected the {answer.target_is} of one of {len(options)} options"
        )
    return options[place]


# ---- templates


class _RowError(ValueError):
    """What is wrong with a row; the caller adds file and row."""


def _parts(template: str, field: str, plain: bool = False) -> list[str]:
    """Text and column names in turns, text first. plain: it may name no column.

    UserError: a brace that is left open, or nothing in it.
    """
    parts, end = [""], 0
    for match in _PLACE.finditer(template):
        parts[-1] += template[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts[-1] += match[0][0]
        elif match[1]:
            parts += [match[1], ""]
        else:
            raise UserError(
                f"{field}: {match[0]!r} at character {match.start() + 1}: write {{column}}, or {{{{ and }}}}"
            )
    parts[-1] += template[end:]
    if len(parts) == 1 and not plain:
        raise UserError(f"{field}: names no column; write {{column}} where its value is to stand")
    return parts


def _fill(parts: Sequence[str], row: Mapping[str, Any]) -> str:
    return "".join(_text(row, part) if number % 2 else part for number, part in enumerate(parts))


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _value(row, column)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _RowError(f"column {column!r} is {_shown(value)}, expected a text or a number")
    return str(value)


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise _RowError(f"column {column!r} is missing; the row has {', '.join(map(str, row))[:200]}")
    return row[column]


def _shown(value: Any) -> str:
    return ascii(value)[:60]


# ---- rules


def _rule(answer: AnswerRule) -> Rule:
    if answer.rule == "number":
        return Rule(scoring.sound_number, scoring.same_number)
    if answer.rule == "contains":
        return Rule(_stripped, lambda generation, gold: gold in generation)
    if answer.rule == "regex":
        assert answer.pattern is not None
        return Rule(_reader(re.compile(answer.pattern)), scoring.same_text)
    if answer.rule == "exact":
        return Rule(_stripped, scoring.same_text)
    return Rule(lambda option: option or None, str.__eq__)


def _stripped(generation: str) -> str | None:
    return generation.strip() or None


def _reader(pattern: re.Pattern[str]) -> scoring.Reader:
    def read(generation: str) -> str | None:
        found = pattern.search(generation)
        return found[1].strip() if found and found[1] is not None else None

    return read
