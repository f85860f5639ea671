"""Writing: under a temporary name in the same folder, flushed to the disk, and only then renamed.

A reader never sees a part of a file, two writers never share a temporary name, and an error or an interrupt leaves what
was there before. What a killed process of this machine left is removed by the next writer of the same name. Files get
the permissions of the umask (safetensors alone would leave 0600, for the owner's eyes only).
"""

import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from neuroada.errors import UserError
from neuroada.files.locks import FolderLock, alive
from neuroada.files.problems import as_user_error, explained

_NAME_BYTES = 100  # of the final name in a temporary one: a file system allows 255 in all


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`: the file the block writes there becomes `path` when the block ends well.

    Parent folders are made. UserError: the file cannot be written (permissions, disk, name), in one line.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        temporary = _temporary(path)
        mode = _create(temporary)
    try:
        yield temporary
        with explained(path):
            temporary.chmod(mode)  # a library may have put a file of its own in its place
            _sync(temporary)
            temporary.replace(path)
            _sync_folder(path.parent)
    except OSError as error:
        raise as_user_error(error, _blamed(error, temporary, path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8. UserError: also where it holds half a surrogate pair, which UTF-8 cannot."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: its text holds half a surrogate pair ({text[error.start]!a}); remove it") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON and a newline. ValueError where it holds NaN or infinity, which JSON does not know."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """Write plain values as YAML, mappings in their own order."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def open_append(path: Path) -> IO[str]:
    """A UTF-8 text file to append lines to (a log: its readers pass over a torn last line). Flush after each line."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")


@contextmanager
def new_folder(path: Path, *, replace: bool = False, size: int = 0, field: str = "") -> Iterator[Path]:
    """Yield an empty folder under a temporary name; it becomes `path` when the block ends well, else it is removed.

    `path` is locked meanwhile, so that a second command is told at once. `size`: bytes that must be free beforehand.
    `field` begins messages, such as "--out ".

    Raises:
        UserError: `path` exists and is not an empty folder (unless `replace`: it is exchanged, whole, at the end);
            another process is writing it; too little space; the disk's own errors.
    """
    path = Path(path)
    told = f"{field}{path}"
    if not replace:
        check_free(path, field)
    path = path.absolute()
    with explained(told):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FolderLock(path, beside=True, field=field):
        with explained(told):
            _clean_up(path)
        if not replace:
            check_free(path, field)
        if (free := shutil.disk_usage(path.parent).free) < size:
            raise UserError(f"{told}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; choose another disk")
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            _finish(temporary)
            _put_in_place(temporary, path, replace)
        except OSError as error:
            raise as_user_error(error, _blamed(error, temporary, told)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, removed at the end; what a kill leaves, the next `new_folder` removes."""
    temporary = _temporary(path.absolute())
    with explained(path):
        temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _blamed(error: OSError, temporary: Path, told: Path | str) -> Path | str:
    """What an error of a writer's block is about: `told`, the file to come, or another that the block opened."""
    named = error.filename
    return named if isinstance(named, str) and not named.startswith(str(temporary)) else told


def check_free(path: Path, field: str = "") -> None:
    """UserError where `new_folder` would find something at `path`."""
    told = f"{field}{path}"
    with explained(told):
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise UserError(f"{told}: is already there; choose a new folder or remove it")


def _finish(folder: Path) -> None:
    """Give every file the umask's permissions and bring it to the disk."""
    probe = folder / f".{secrets.token_hex(8)}"
    mode = _create(probe)
    probe.unlink()
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent) / name
            if not file.is_symlink():
                file.chmod(mode)
                _sync(file)
        _sync_folder(Path(parent))


def _put_in_place(folder: Path, path: Path, replace: bool) -> None:
    old = None
    if replace and os.path.lexists(path):
        old = _temporary(path).with_suffix(".old")
        path.rename(old)
    try:
        folder.replace(path)
    except BaseException:
        if old is not None:
            old.rename(path)
        raise
    _sync_folder(path.parent)
    if old is not None:
        _remove(old)


def _temporary(path: Path) -> Path:
    """A name that no other process or thread uses."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}.{secrets.token_hex(8)}.partial")


def _clean_up(path: Path) -> None:
    """Remove what dead processes of this machine left for `path`."""
    left = re.compile(re.escape(_prefix(path)) + r"(\d{1,9})\.[0-9a-f]{16}\.(partial|old)")
    for other in path.parent.iterdir():
        if (found := left.fullmatch(other.name)) and not alive(int(found[1])):
            if found[2] == "old" and not os.path.lexists(path):  # killed between the two renames of an exchange
                other.rename(path)
            else:
                _remove(other)


def _prefix(path: Path) -> str:
    name = path.name.encode(errors="surrogateescape")[:_NAME_BYTES].decode(errors="ignore")
    return f".{name}.{re.sub(r'[^A-Za-z0-9-]', '-', platform.node())[:60]}."


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _create(path: Path) -> int:
    """Create an empty file; returns the permissions that the umask gave it."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some network file systems refuse it for folders
        _sync(path)
