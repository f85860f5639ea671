"""From a path or a hub name to rows, one after the other: no source is ever held in memory whole.

JSON is read object by object, so that a bad line is named and can be skipped, and nothing is added to a row. All of a
CSV is text: a column of numbers, or the word NA, must reach the prompt as it stands. The rest is read by `datasets`,
which executes nothing that a data set brings (its loading scripts are gone since 4.0).
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.compression import available_compressions

from neuroada.config.data import Dataset
from neuroada.errors import UserError
from neuroada.files import Refused, open_regular, strict_json

_JSON = (".json", ".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_BY_DATASETS = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (*_JSON, *_BY_DATASETS, *_SEPARATORS, ".txt")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PIECE = 2**20  # characters of a JSON list read at once
_TEXT_LIMIT = 2**28  # characters of a .txt file, which is one document


class Row(NamedTuple):
    """A row as it was read. `where`: file and number, from 1; `error`: why it could not be read, instead of values."""

    where: str
    values: Any
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """One entry of data.datasets, found."""

    spec: Dataset
    files: tuple[Path, ...]
    """Of local data; () for a hub data set."""
    streaming: bool = False
    field: str = "data.datasets"

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of the files. UserError where a file cannot be read."""
        if not self.files:
            yield from _numbered(_hub(self.spec, self.streaming, self.field), self.spec.path)
        elif _saved(Path(self.spec.path)):
            yield from _numbered(_load_saved(self.spec), self.spec.path)
        else:
            for file in self.files:
                yield from _read_file(file)

    def fingerprint(self) -> str:
        """sha256 (hex) of the content; of a hub data set: of its files, by the fingerprint `datasets` gives them."""
        digest = hashlib.sha256()
        if not self.files:
            digest.update(_hub_identity(self.spec, self.field).encode())
        for path in self.files:
            with open_regular(path) as file:
                digest.update(f"{path.name} ".encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def find_source(spec: Dataset, streaming: bool = False, field: str = "data.datasets") -> Source:
    """Find the files of `spec`, which stands in `field`.

    UserError if there are none, or the split is not there; no row is read yet.
    """
    path = Path(spec.path).expanduser()
    if any(character in spec.path for character in "*?["):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (a Path's own takes no absolute pattern)
        files = [Path(one) for one in found if Path(one).is_file()]
        if not files:
            raise UserError(f"{field}: {spec.path} matches no file; check the pattern and the working directory")
        return _local(spec, files, field)
    if path.is_file():
        return _local(spec, [path], field)
    if path.is_dir():
        found_there = (_saved_files if _saved(path) else _folder_files)(spec, path, field)
        return Source(spec, tuple(found_there), field=field)
    if _suffix(path) in SUFFIXES or path.is_absolute() or spec.path.startswith(".") or spec.path.count("/") > 1:
        raise UserError(f"{field}: {spec.path}: no such file or folder; check the path and the working directory")
    return Source(spec, (), streaming, field)


def _local(spec: Dataset, files: list[Path], field: str) -> Source:
    if spec.split != "train":
        raise UserError(
            f"{field}: {spec.path}: split {spec.split!r} does not exist, a file has no splits; leave split out"
        )
    for unread in ("revision", "name"):
        if getattr(spec, unread) is not None:
            raise UserError(f"{field}: {spec.path}: {unread} is of hub data sets only; leave it out")
    for file in files:
        if _suffix(file) not in SUFFIXES:
            raise UserError(f"{file}: data of this kind is not read; give one of {', '.join(SUFFIXES)}")
    return Source(spec, tuple(files), field=field)


def _suffix(path: Path) -> str:
    """The suffix that says the form: of `a.jsonl.gz`, .jsonl."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


# ---- folders


def _saved(path: Path) -> bool:
    """Whether `path` was written by `Dataset.save_to_disk` (or DatasetDict's)."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_files(spec: Dataset, path: Path, field: str) -> list[Path]:
    folder = path
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        if spec.split not in splits:
            raise _no_split(spec, splits, field)
        folder = path / spec.split
    return sorted(folder.glob("*.arrow"))


def _load_saved(spec: Dataset) -> Any:
    import datasets

    folder = Path(spec.path)
    try:
        return datasets.load_from_disk(folder / spec.split if (folder / "dataset_dict.json").is_file() else folder)
    except Exception as error:
        raise UserError(
            f"{spec.path}: this saved data set cannot be read ({_first_line(error)}); save it again"
        ) from None


def _folder_files(spec: Dataset, path: Path, field: str) -> list[Path]:
    """The split's files, by the naming rules of the hub (train-*.parquet, data/test/*.jsonl; no split named: train)."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(str(path))
    except (EmptyDatasetError, FileNotFoundError):
        patterns = {}
    splits = DataFilesDict.from_patterns(patterns, base_path=str(path))
    found = {
        str(split): [Path(file) for file in files if _suffix(Path(file)) in SUFFIXES] for split, files in splits.items()
    }
    found = {split: files for split, files in found.items() if files}
    if not found:
        raise UserError(f"{field}: {path} holds no data; put files there that end in {', '.join(SUFFIXES)}")
    if spec.split not in found:
        raise _no_split(spec, sorted(found), field)
    return sorted(found[spec.split])


def _no_split(spec: Dataset, known: list[str], field: str) -> UserError:
    return UserError(f"{field}: {spec.path}: split {spec.split!r} does not exist; it has {', '.join(known)}")


# ---- the hub


def _hub(spec: Dataset, streaming: bool, field: str) -> Any:
    import datasets

    where = f"{field}: {spec.path}"
    try:
        return datasets.load_dataset(
            spec.path, spec.name, split=spec.split, revision=spec.revision, streaming=streaming
        )
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"{where}: no such file, and no such data set on the hub; check the name, or log in") from None
    except ValueError as error:  # an unknown split or configuration: the message lists what there is
        raise UserError(f"{where}: {_first_line(error)}; check name, split and revision") from None
    except Exception as error:
        raise UserError(f"{where}: cannot be loaded from the hub ({_first_line(error)})") from None


def _hub_identity(spec: Dataset, field: str) -> str:
    """What stands for a hub data set's content: its commit, or offline what lies in the cache."""
    from huggingface_hub import HfApi

    try:
        content: Any = HfApi().dataset_info(spec.path, revision=spec.revision).sha
    except Exception:
        # The cached Arrow files lie in a folder that `datasets` names by the content they were made from.
        cached = _hub(spec, streaming=False, field=field).cache_files
        content = sorted(Path(file["filename"]).parts[-4:] for file in cached)
    return json.dumps([spec.path, spec.name, spec.split, content])


# ---- files


def _numbered(rows: Any, name: str) -> Iterator[Row]:
    number = 0
    try:
        for number, values in enumerate(rows, 1):
            yield Row(f"{name}, row {number}", values)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: cannot be read after row {number} ({_first_line(error)}); the file may be incomplete"
        ) from None


def _read_file(file: Path) -> Iterator[Row]:
    suffix = _suffix(file)
    if suffix in _BY_DATASETS:
        yield from _read_by_datasets(file, _BY_DATASETS[suffix])
        return
    if file.suffix.lower() == ".zst" and "zstd" not in available_compressions():
        raise UserError(f"{file}: zstandard is not installed; pip install zstandard, or decompress the file")
    try:
        with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="").open() as opened:
            if suffix in _JSON:
                yield from _read_json(file, opened)
            elif suffix in _SEPARATORS:
                yield from _read_csv(file, opened, _SEPARATORS[suffix])
            else:
                yield Row(f"{file}, row 1", {"text": _read_text(file, opened)})
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except UserError:
        raise
    except Exception as error:  # each decompressor has errors of its own
        raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None


def _read_by_datasets(file: Path, builder: str) -> Iterator[Row]:
    import datasets

    try:
        # Streamed: read once, in order, without an Arrow copy of the file.
        rows = datasets.load_dataset(builder, data_files=[str(file)], split="train", streaming=True)
    except Exception as error:
        raise UserError(f"{file}: not a {builder} file ({_first_line(error)}); it may be incomplete") from None
    yield from _numbered(rows, str(file))


def _read_csv(file: Path, opened: Any, separator: str) -> Iterator[Row]:
    csv.field_size_limit(_TEXT_LIMIT)
    number = 0
    try:
        for number, values in enumerate(csv.DictReader(opened, delimiter=separator, strict=True), 1):
            where = f"{file}, row {number}"
            if None in values or None in values.values():
                yield Row(where, None, "as many fields as the header names are expected; quote those with a separator")
            else:
                yield Row(where, values)
    except csv.Error as error:
        raise UserError(f"{file}: not CSV after row {number} ({error}); it may be incomplete") from None


def _read_text(file: Path, opened: Any) -> str:
    text = opened.read(_TEXT_LIMIT + 1)
    if len(text) > _TEXT_LIMIT:
        raise UserError(
            f"{file}: a text file is one document, and this one has more than {_TEXT_LIMIT:,} characters; "
            "divide it, or write a .jsonl with a text a row"
        )
    return text


def _read_json(file: Path, opened: Any) -> Iterator[Row]:
    """Objects of a file with one a line, or of one list."""
    start = opened.read(1)
    while start.isspace():
        start = opened.read(1)
    yield from _read_list(file, opened) if start == "[" else _read_lines(file, start, opened)


def _read_lines(file: Path, start: str, opened: Any) -> Iterator[Row]:
    number = 0
    while line := start + opened.readline(_TEXT_LIMIT + 1):
        if len(line) > _TEXT_LIMIT:
            raise UserError(f"{file}: after row {number} a line has over {_TEXT_LIMIT:,} characters; divide it")
        line, start = line.rstrip(), ""
        if not line:
            continue
        number += 1
        yield _strict_row(f"{file}, row {number}", line)


def _read_list(file: Path, opened: Any) -> Iterator[Row]:
    """The objects between `[` and `]`, decoded as they come."""
    # Finds where an object ends; a number that is cut off at the buffer's end is not judged before it is whole.
    decoder = json.JSONDecoder(parse_int=float)
    buffer, number, ended = "", 0, False
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            # A number at the buffer's end may go on: only what something follows is whole.
            _, end = decoder.raw_decode(buffer)
            if end == len(buffer) and not ended:
                raise json.JSONDecodeError("more to come", buffer, end)
        except json.JSONDecodeError as error:
            if ended:
                raise UserError(f"{file}: not JSON after row {number} ({error.msg}); write a list of objects") from None
            if len(buffer) > _TEXT_LIMIT:
                raise UserError(
                    f"{file}: not JSON after row {number}, or a row of over {_TEXT_LIMIT:,} characters; divide it"
                ) from None
            piece = opened.read(max(_PIECE, len(buffer)))  # doubled: a large object is not decoded many times
            ended, buffer = not piece, buffer + piece
            continue
        except RecursionError:
            raise UserError(f"{file}: row {number + 1} is nested too deep; write a list of flat objects") from None
        number += 1
        row, buffer = buffer[:end], buffer[end:]
        yield _strict_row(f"{file}, row {number}", row)


def _strict_row(where: str, text: str) -> Row:
    try:
        return Row(where, strict_json(text))
    except json.JSONDecodeError as error:
        return Row(where, None, f"not JSON at column {error.colno} ({error.msg}); write one object a line")
    except Refused as error:
        return Row(where, None, f"{error}; correct it")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
