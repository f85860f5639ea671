"""From rows of the five formats to one of four common forms, every row checked.

chat                 turns, as OpenAI's messages or ShareGPT's conversations, with tools and a system turn
prompt_completion    what is given and what is to be learnt, as two texts or two lists of turns
alpaca               instruction, input, output
text                 text to continue
preference           a prompt with a better and a worse answer, as texts or turns
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from neuroada.config.data import Dataset, Roles
from neuroada.errors import UserError
from neuroada.files import Refused, strict_json


class RowError(ValueError):
    """What is wrong with a row and what would be right; the caller adds file and row."""


@dataclass(frozen=True)
class Chat:
    """Turns for the chat template. The first `given` of them are a prompt: no loss there."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    given: int = 0


@dataclass(frozen=True)
class Completion:
    """A text to go on from, and the text to learn."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt."""

    chosen: Chat | Completion
    rejected: Chat | Completion


Example = Chat | Completion | Text | Preference


@dataclass(frozen=True)
class Format:
    """columns: what is read -> the names it usually has; the first `required` of them must be there."""

    columns: dict[str, tuple[str, ...]]
    required: int
    read: Callable[[RowReader, dict[str, Any]], Example]


@dataclass(frozen=True)
class RowReader:
    """Turns the rows of one source into examples."""

    name: str
    format: Format
    columns: dict[str, str]
    """What is read -> the column that holds it."""
    turn_keys: dict[str, tuple[str, ...]]
    role_names: dict[str, str]
    ignored: frozenset[str]
    chat_prompts: bool
    """Whether an alpaca row becomes turns for the chat template."""

    def __call__(self, row: Any) -> Example:
        """RowError where the row is not of the format, or holds a filled column that nobody reads."""
        if not isinstance(row, dict):
            raise RowError(f"a {type(row).__name__}, expected an object with {', '.join(self.required)}")
        self._check_unread(row)
        for column in self.required:
            if row.get(column) is None:
                raise RowError(f"column {column!r} is missing; a row of {self.name} has it, or name another in columns")
        return self.format.read(self, {key: row.get(column) for key, column in self.columns.items()})

    @property
    def required(self) -> list[str]:
        """The columns that no row may lack."""
        return list(self.columns.values())[: self.format.required]

    def _check_unread(self, row: dict[str, Any]) -> None:
        read = set(self.columns.values()) | self.ignored
        unread = [column for column, value in row.items() if column not in read and value not in (None, "", [], {})]
        if unread:
            raise RowError(
                f"column {unread[0]!r} is filled but {self.name} does not read it; name it in columns, "
                f"or set ignore_columns: [{', '.join(sorted([*unread, *self.ignored]))}]"
            )

    def text(self, values: dict[str, Any], key: str) -> str:
        value = values.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RowError(f"{self.columns[key]} is {_short(value)}, expected text")
        return value

    def turns(self, value: Any, column: str) -> list[dict[str, Any]]:
        """Messages with the roles and keys that chat templates read."""
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value:
            raise RowError(f"{column} is {_short(value)}, expected a list of turns")
        return [self._turn(turn, f"{column}, turn {number}") for number, turn in enumerate(value, 1)]

    def _turn(self, turn: Any, where: str) -> dict[str, Any]:
        if not isinstance(turn, dict):
            raise RowError(f"{where} is {_short(turn)}, expected an object with role and content")
        turn = {key: value for key, value in turn.items() if value is not None}
        role_key = next((key for key in self.turn_keys["role"] if key in turn), None)
        if role_key is None:
            raise RowError(f"{where}: key {self.turn_keys['role'][0]!r} is missing; name another in columns.role")
        content_key = next((key for key in self.turn_keys["content"] if key in turn), None)
        named = turn[role_key]
        role = self.role_names.get(named) if isinstance(named, str) else None
        if role is None:
            raise RowError(
                f"{where}: role {_short(named)} is unknown; known: {', '.join(self.role_names)}; add it under roles"
            )
        message = {"role": role, "content": _content(turn.get(content_key or ""), where)}
        for key, value in turn.items():
            if key in _TURN_EXTRAS:
                message[key] = _TURN_EXTRAS[key](value)
            elif key not in (role_key, content_key) and value not in ("", [], {}) and key not in self.ignored:
                raise RowError(f"{where}: key {key!r} is filled but nobody reads it; add it to ignore_columns")
        if role == "assistant" and not (message["content"] or "").strip() and not message.get("tool_calls"):
            raise RowError(f"{where}: the assistant's turn is empty; fill it, or remove the row")
        if message["content"] is None and not message.get("tool_calls"):
            raise RowError(f"{where}: key {self.turn_keys['content'][0]!r} is missing; name another in columns.content")
        return message


def make_reader(spec: Dataset, columns: Iterable[str], has_template: bool) -> RowReader:
    """The reader of a source whose rows have `columns` (those of its first row). UserError if none fits.

    has_template: whether there is a chat template, so that alpaca rows can become turns.
    """
    columns = list(columns)
    name = spec.type or recognise(spec, columns)
    format = FORMATS[name]
    # A column that the first row lacks may come later: JSON rows leave out what is empty.
    chosen = {key: _column(spec, key, usual, columns) or usual[0] for key, usual in format.columns.items()}
    named = {key: value for key, value in spec.columns.model_dump().items() if value is not None}
    for key, column in named.items():
        if key not in format.columns and key not in ("role", "content"):
            raise UserError(f"data.datasets: {spec.path}: columns.{key} is not read by {name}; leave it out")
        if key in list(format.columns)[: format.required] and column not in columns:
            raise UserError(
                f"data.datasets: {spec.path}: columns.{key} = {column!r} is no column; it has {', '.join(columns)}"
            )
    return RowReader(
        name=name,
        format=format,
        columns=chosen,
        turn_keys={
            "role": (spec.columns.role,) if spec.columns.role else ("role", "from"),
            "content": (spec.columns.content,) if spec.columns.content else ("content", "value"),
        },
        role_names=_role_names(spec.roles),
        ignored=frozenset(spec.ignore_columns),
        chat_prompts=has_template,
    )


def recognise(spec: Dataset, columns: list[str]) -> str:
    """The format whose required columns are all there. UserError if there is none."""
    for name, format in FORMATS.items():
        required = list(format.columns.items())[: format.required]
        if all(_column(spec, key, usual, columns) is not None for key, usual in required):
            return name
    expected = "; ".join(
        f"{name}: {', '.join(usual[0] for usual in list(format.columns.values())[: format.required])}"
        for name, format in FORMATS.items()
    )
    raise UserError(
        f"data.datasets: {spec.path}: no format is recognised from the columns {', '.join(columns)}; "
        f"set type and columns ({expected})"
    )


def _column(spec: Dataset, key: str, usual: tuple[str, ...], columns: list[str]) -> str | None:
    named = getattr(spec.columns, key)
    return named if named is not None else next((column for column in usual if column in columns), None)


def _role_names(roles: Roles) -> dict[str, str]:
    """The name in the file -> the role; the names of `Roles`' defaults hold beside those a user gives."""
    usual = {name: role for role, names in Roles() for name in names}
    return {**usual, **{name: role for role, names in roles for name in names}}


# ---- the formats


def _read_chat(reader: RowReader, values: dict[str, Any]) -> Chat:
    messages = reader.turns(values["messages"], reader.columns["messages"])
    if system := reader.text(values, "system"):
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{reader.columns['messages']}: no assistant turn, so nothing to learn; remove the row")
    return Chat(messages, _tools(values.get("tools")))


def _read_prompt_completion(reader: RowReader, values: dict[str, Any]) -> Chat | Completion:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowError(f"{reader.columns['completion']} is empty, nothing to learn; fill it, or remove the row")
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("prompt and completion are one text and one list of turns; make both the same")
    given = reader.turns(prompt, reader.columns["prompt"])
    learnt = reader.turns(completion, reader.columns["completion"])
    if not any(message["role"] == "assistant" for message in learnt):
        raise RowError(f"{reader.columns['completion']}: no assistant turn, so nothing to learn; remove the row")
    return Chat(given + learnt, _tools(values.get("tools")), len(given))


def _read_alpaca(reader: RowReader, values: dict[str, Any]) -> Chat | Completion:
    """Turns where there is a chat template; else the prompt that Stanford's Alpaca was trained with."""
    instruction, context, output = (reader.text(values, key) for key in ("instruction", "input", "output"))
    if not output.strip():
        raise RowError(f"{reader.columns['output']} is empty, nothing to learn; fill it, or remove the row")
    system = reader.text(values, "system")
    if reader.chat_prompts:
        asked = f"{instruction}\n\n{context}" if context else instruction
        turns = [("system", system), ("user", asked), ("assistant", output)]
        messages = [{"role": role, "content": content} for role, content in turns if content or role != "system"]
        return Chat(messages, None, len(messages) - 1)
    if system:
        raise RowError(f"{reader.columns['system']} is filled, but without a chat template nothing reads it")
    paired = ", paired with an input that provides further context" if context else ""
    section = f"### Input:\n{context}\n\n" if context else ""
    return Completion(
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{section}### Response:\n",
        output,
    )


def _read_text(reader: RowReader, values: dict[str, Any]) -> Text:
    text = reader.text(values, "text")
    if not text.strip():
        raise RowError(f"{reader.columns['text']} is empty, nothing to learn; fill it, or remove the row")
    return Text(text)


def _read_preference(reader: RowReader, values: dict[str, Any]) -> Preference:
    prompt, chosen, rejected = values.get("prompt"), values["chosen"], values["rejected"]
    if chosen == rejected:
        raise RowError("chosen and rejected are the same; remove the row")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        for key in ("chosen", "rejected"):
            if not values[key].strip():
                raise RowError(f"{reader.columns[key]} is empty; fill it, or remove the row")
        return Preference(Completion(prompt, chosen), Completion(prompt, rejected))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("chosen and rejected as text need a prompt that is text; as turns, all of them are lists")
    better = reader.turns(chosen, reader.columns["chosen"])
    worse = reader.turns(rejected, reader.columns["rejected"])
    given = _shared_turns(better, worse)
    if isinstance(prompt, list | dict):
        asked = reader.turns(prompt, reader.columns["prompt"])
        if better[: len(asked)] != asked:  # the answers alone: the prompt stands before them
            better, worse, given = asked + better, asked + worse, len(asked) + given
    elif isinstance(prompt, str):
        turn = {"role": "user", "content": prompt}
        if given == 0:
            better, worse, given = [turn, *better], [turn, *worse], 1
        elif turn not in better[:given]:
            raise RowError(f"{reader.columns['prompt']} is not the turn that chosen and rejected begin with")
    if given == 0:
        raise RowError("chosen and rejected share no first turn, and there is no prompt; add a prompt column")
    tools = _tools(values.get("tools"))
    return Preference(Chat(better, tools, given), Chat(worse, tools, given))


def _shared_turns(better: list[dict[str, Any]], worse: list[dict[str, Any]]) -> int:
    shared = 0
    while shared < min(len(better), len(worse)) and better[shared] == worse[shared]:
        shared += 1
    return shared


FORMATS = {  # in the order they are recognised
    "preference": Format(
        {"chosen": ("chosen",), "rejected": ("rejected",), "prompt": ("prompt",), "tools": ("tools",)},
        2,
        _read_preference,
    ),
    "alpaca": Format(
        {"instruction": ("instruction",), "output": ("output",), "input": ("input",), "system": ("system",)},
        2,
        _read_alpaca,
    ),
    "prompt_completion": Format(
        {"prompt": ("prompt",), "completion": ("completion",), "tools": ("tools",)}, 2, _read_prompt_completion
    ),
    "chat": Format(
        {"messages": ("messages", "conversations", "conversation"), "system": ("system",), "tools": ("tools",)},
        1,
        _read_chat,
    ),
    "text": Format({"text": ("text",)}, 1, _read_text),
}


# ---- values


def _content(value: Any, where: str) -> str | None:
    """Text, or OpenAI's list of text parts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise RowError(f"{where}: the content is {_short(value)}, expected text (images and sound are not read)")


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = strict_json(value)
        except (json.JSONDecodeError, Refused) as error:
            raise RowError(f"tools is no JSON ({error}); write a list of JSON schemas") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"tools is {_short(value)}, expected a list of JSON schemas")
    return value


def _tool_calls(value: Any) -> Any:
    """Chat templates want a call's arguments as an object; OpenAI gives them as JSON text."""
    if not isinstance(value, list):
        raise RowError(f"tool_calls is {_short(value)}, expected a list")
    calls = []
    for call in value:
        if not isinstance(call, dict):
            raise RowError(f"tool_calls holds {_short(call)}, expected objects")
        function = dict(call.get("function") or call)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = strict_json(function["arguments"])
            except (json.JSONDecodeError, Refused) as error:
                raise RowError(f"tool_calls: the arguments are no JSON ({error})") from None
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


_TURN_EXTRAS: dict[str, Callable[[Any], Any]] = {
    "tool_calls": _tool_calls,
    "tool_call_id": lambda value: value,
    "name": lambda value: value,
    "reasoning_content": lambda value: value,
    "thinking": lambda value: value,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
