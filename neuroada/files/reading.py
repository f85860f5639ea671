"""Reading text, JSON and YAML: bounded in size and depth, strict about keys and numbers, checked against a schema."""

import difflib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from neuroada.errors import UserError
from neuroada.files.problems import explained

MAX_BYTES = 64 << 20  # of a file; data files, which are larger, are read with a limit of their own
MAX_DEPTH = 60  # of lists and mappings in each other
MAX_VALUES = 200_000  # lists and mappings of a YAML file, each alias counted as what it stands for
MAX_INTEGER = 2**63 - 1  # what torch, numpy and most readers of JSON can hold

Schema = TypeVar("Schema", bound=BaseModel)


@contextmanager
def open_regular(path: Path, remedy: str | None = None) -> Iterator[BufferedReader]:
    """A regular file, open for reading; a pipe or a device would make its reader wait, or never end. UserError."""
    with explained(path, remedy):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not blocking: a pipe without a writer
        try:
            kind = os.fstat(handle).st_mode
            if not stat.S_ISREG(kind):
                what = "a folder, not a file" if stat.S_ISDIR(kind) else "a pipe or a device, not a file"
                raise UserError(f"{path}: is {what}; {remedy or 'check the path'}")
            with os.fdopen(handle, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(handle)


def read_bytes(path: Path, *, limit: int = MAX_BYTES, remedy: str | None = None) -> bytes:
    """A file's content. UserError: more than `limit` bytes, or unreadable."""
    with open_regular(path, remedy) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, limit) + 1) if size <= limit else None  # read() allocates what it is asked for
    if content is None or len(content) > limit:
        raise UserError(f"{path}: is larger than {limit:,} bytes; {remedy or 'it is not what it should be'}")
    return content


def read_text(path: Path, *, limit: int = MAX_BYTES, remedy: str | None = None) -> str:
    """A UTF-8 file's text, without a byte-order mark. UserError: missing, unreadable, too large, not UTF-8."""
    content = read_bytes(path, limit=limit, remedy=remedy)
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; {remedy or 'save it as UTF-8'}") from None


def read_json(path: Path, *, limit: int = MAX_BYTES, remedy: str | None = None) -> Any:
    """A JSON file's value. UserError: as `read_text`, and as `parse_json`."""
    return parse_json(read_text(path, limit=limit, remedy=remedy), str(path), remedy)


def read_json_lines(path: Path, *, limit: int = MAX_BYTES, torn: bool = False) -> list[Any]:
    """A value a line. `torn`: a last line without its newline, whose writer was killed, is left out."""
    lines = read_text(path, limit=limit).split("\n")
    if torn or not lines[-1].strip():
        lines.pop()
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_yaml(path: Path, *, limit: int = 1 << 20, remedy: str | None = None) -> Any:
    """A YAML file's value. UserError: as `read_text`, and as `parse_yaml`."""
    return parse_yaml(read_text(path, limit=limit, remedy=remedy), str(path), remedy)


def parse_json(text: str, where: str, remedy: str | None = None) -> Any:
    """`text` as JSON. `where` begins messages, `remedy` ends them.

    UserError: not JSON, a key twice in an object, NaN, deeper than MAX_DEPTH, an integer over 64 bits, half a
    surrogate pair in a text.
    """
    try:
        return strict_json(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        problem = "is empty" if not text.strip() else f"not JSON at {place} ({error.msg[0].lower()}{error.msg[1:]})"
    except Refused as error:
        problem = str(error)
    raise UserError(f"{where}: {problem}; {remedy or 'correct it or write it again'}")


def strict_json(text: str) -> Any:
    """`parse_json` for a reader that tells where by itself. Raises json.JSONDecodeError and Refused."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
        _check(value, None)
    except RecursionError:
        raise Refused(f"nested deeper than {MAX_DEPTH}") from None
    return value


def parse_yaml(text: str, where: str, remedy: str | None = None) -> Any:
    """`text` as YAML: plain values only, and 1e-3 is a number (YAML 1.1 takes it for text).

    UserError: not YAML, a tag, a key twice in a mapping, deeper than MAX_DEPTH, more than MAX_VALUES lists and mappings
    (aliases of aliases grow without end), an integer over 64 bits.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
        _check(value, MAX_VALUES)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{where}: not YAML{place} ({problem}); {remedy or 'correct it'}") from None
    except (Refused, RecursionError) as error:
        problem = str(error) if isinstance(error, Refused) else f"nested deeper than {MAX_DEPTH}"
        raise UserError(f"{where}: {problem}; {remedy or 'correct it'}") from None
    except (ValueError, TypeError, OverflowError) as error:  # a date such as 2026-99-99
        raise UserError(f"{where}: {error}; {remedy or 'correct it'}") from None
    return value


def check_schema(schema: type[Schema], value: Any, where: str, remedy: str | None = None) -> Schema:
    """`value` as a `schema`. UserError: `where`, then each error as its field, its value and what would be right."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        found = [_explain(schema, one) for one in error.errors(include_url=False)]
    except RecursionError:
        found = [f"nested deeper than {MAX_DEPTH}"]
    told = "; ".join([*found[:8], *([f"and {len(found) - 8} more"] if len(found) > 8 else [])])
    raise UserError(f"{where}: {told}" + (f"; {remedy}" if remedy else "")) from None


def member(folder: Path, name: Any, remedy: str = "fetch the folder again") -> Path:
    """The path of a file that a text in `folder` names: of the folder itself, whatever the text and symbolic links say.

    A link may lead to the blobs of a hub cache's snapshot, where huggingface_hub puts all files. It need not exist.
    """
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name or "\\" in name:
        raise UserError(f"{folder}: {_short(name)} is no name of a file in this folder; {remedy}")
    path = folder / name
    check_inside(folder, path, remedy)
    return path


def check_inside(folder: Path, path: Path, remedy: str = "copy the file into the folder") -> None:
    """UserError where `path`, a file of `folder`, is a symbolic link that leads out of it (a hub cache's may)."""
    with explained(path):  # realpath, since Path.resolve has an error of its own for links in a circle (Python < 3.13)
        home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    snapshot = home.parent.name == "snapshots" and re.match("(models|datasets|spaces)--", home.parent.parent.name)
    allowed = [home, *([home.parent.parent / "blobs"] if snapshot else [])]
    if not any(real.is_relative_to(root) for root in allowed):
        raise UserError(f"{path}: is a link to {real}, outside its folder; {remedy}")


class Refused(ValueError):
    """What JSON or YAML allows and this project does not; the text says what."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Refused(f"key {_short(next(key for key in keys if keys.count(key) > 1))} stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) <= 20 and abs(value := int(text)) <= MAX_INTEGER:
        return value
    raise Refused(f"the number {text[:24]}{'...' * (len(text) > 24)} is beyond 64 bits")


def _constant(name: str) -> float:
    if name == "NaN":
        raise Refused("holds NaN, which is no number")
    return float(name)  # infinities stand in some models' configurations


def _check(value: Any, most: int | None) -> None:
    """Depth, number (`most`) and texts of what was read; level by level, since a recursion has bounds of its own."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for one in level:
            for part in _parts(one):
                if isinstance(part, str):
                    if not part.isascii() and any("\ud800" <= letter <= "\udfff" for letter in part):
                        raise Refused(f"half a surrogate pair in the text {ascii(part)[:40]}")
                elif isinstance(part, dict | list | tuple | set):
                    deeper.append(part)
            if most is not None and count + len(deeper) > most:
                raise Refused(f"holds more than {most:,} lists and mappings")
        if not deeper:
            return
        level, count = deeper, count + len(deeper)
    raise Refused(f"nested deeper than {MAX_DEPTH}")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    else:
        yield value if isinstance(value, str) else None


class _Loader(yaml.SafeLoader):
    """YAML's plain values, each key once in a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if key_node.tag == "tag:yaml.org,2002:merge":  # merges of merges grow without end, before they are counted
                raise Refused(
                    f"line {key_node.start_mark.line + 1}: merge keys (<<) are not read; write the fields out"
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise Refused(f"line {key_node.start_mark.line + 1}: a key must be a plain value")
            if key in seen:
                raise Refused(f"line {key_node.start_mark.line + 1}: key {_short(key)} stands twice in one mapping")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _yaml_integer(loader: _Loader, node: Any) -> int:
    if len(node.value) > 80:
        raise Refused(f"the number {node.value[:24]}... is beyond 64 bits")
    value = loader.construct_yaml_int(node)
    if abs(value) > MAX_INTEGER:
        raise Refused(f"the number {node.value[:24]}{'...' * (len(node.value) > 24)} is beyond 64 bits")
    return int(value)


_Loader.add_constructor("tag:yaml.org,2002:int", _yaml_integer)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _explain(schema: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors: the field, its value, what would be right."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(schema, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}" if known else "leave it out"
        return f"{field}: no such field; {hint}"
    if error["type"] == "missing":
        return f"{field}: missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    said = f"{field} = {_short(error['input'])}" if field else _short(error["input"])
    return f"{said}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields(schema: Any, place: tuple[Any, ...]) -> list[str]:
    """The fields of the section at `place`; [] where it is no section of its own."""
    for part in place:
        if isinstance(part, str):  # not a number in a list
            field = getattr(schema, "model_fields", {}).get(part)
            schema = field.annotation if field is not None else None
        while schema is not None and not hasattr(schema, "model_fields"):  # list[Section], Section | None
            schema = next(iter(get_args(schema)), None)
    return list(getattr(schema, "model_fields", {}))


def _short(value: Any) -> str:
    """A value in a message: one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
