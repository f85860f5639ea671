"""Sequences on disk: flat arrays that are memory-mapped, so that no rank holds the tokens of all.

    <folder>/tokens    int32 [tokens]         all sequences, one after the other
             learnt    uint8 [tokens]         1 where the token is to be predicted
             offsets   int64 [sequences + 1]  sequence i is tokens[offsets[i] : offsets[i + 1]]
             learnt_counts int32 [sequences]  tokens of each that are learnt
             rows      int64 [sequences]      the source's row (from 0) that each was made from
             facts.json                       what the arrays are, and what was left out; written last

A unit is what the order of training counts: a sequence, or the two of a preference pair, which lie side by side.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import RootModel

from neuroada.data.encoding import Counts, Tokens
from neuroada.errors import UserError
from neuroada.files import check_schema, explained, open_regular, read_json, write_json

_ARRAYS = {"tokens": np.int32, "learnt": np.uint8, "offsets": np.int64, "learnt_counts": np.int32, "rows": np.int64}
_BUFFER = 2**16  # sequences held back before they are written
LISTED = 20  # skipped rows that are told one by one


@dataclass
class Facts:
    """What became of a source's rows."""

    format: str = ""
    unit: int = 1  # sequences of a unit: 2 for preference pairs
    rows: int = 0  # read
    skipped: int = 0
    skipped_rows: list[str] = field(default_factory=list)  # the first of them, a line each
    dropped: dict[str, int] = field(default_factory=dict)  # why -> how many units
    truncated: int = 0
    split: int = 0
    unrolled: int = 0
    sha256: str = ""  # of the arrays and of what stands above

    def take(self, counts: Counts) -> None:
        """Take over what the encoder counted."""
        self.dropped = dict(counts.dropped)
        self.truncated, self.split, self.unrolled = counts.truncated, counts.split, counts.unrolled


class FactsFile(RootModel[Facts]):
    """facts.json."""


class Writer:
    """Writes a store under a temporary name, in constant memory; `finish` gives it its own. Use as a context, under a
    lock of the store's name: what a killed writer left is removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        for left in folder.parent.glob(f".{folder.name}.{'[0-9a-f]' * 32}"):
            shutil.rmtree(left, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.files = {name: (self.temporary / name).open("wb") for name in _ARRAYS}
        self.files["offsets"].write(np.zeros(1, np.int64).tobytes())
        self.units = 0
        self.end = 0
        self.held: dict[str, list[Any]] = {name: [] for name in _ARRAYS}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, unit: list[Tokens], row: int) -> None:
        self.units += 1
        for one in unit:
            self.end += len(one)
            self.held["tokens"].append(one.ids)
            self.held["learnt"].append(one.learnt)
            self.held["offsets"].append(self.end)
            self.held["learnt_counts"].append(int(one.learnt.sum()))
            self.held["rows"].append(row)
        if len(self.held["rows"]) >= _BUFFER:
            self._flush()

    def finish(self, facts: Facts) -> None:
        self._flush()
        for file in self.files.values():
            file.close()
        facts.sha256 = _checksum(self.temporary, facts)
        write_json(self.temporary / "facts.json", asdict(facts))
        with explained(self.folder):
            if self.folder.is_dir():  # one that was found damaged
                shutil.rmtree(self.folder)
            self.temporary.replace(self.folder)

    def _flush(self) -> None:
        for name, dtype in _ARRAYS.items():
            held = self.held[name]
            if held:
                whole = np.concatenate(held) if name in ("tokens", "learnt") else np.array(held)
                self.files[name].write(whole.astype(dtype, copy=False).tobytes())
                held.clear()


class Store:
    """Sequences that a Writer wrote, memory-mapped. UserError: they are not what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with explained(folder):
            self.facts = check_schema(FactsFile, read_json(folder / "facts.json"), str(folder)).root
            if self.facts.sha256 != _checksum(folder, self.facts):
                raise UserError(f"{folder}: damaged encoded data; remove the folder, and they are made again")
            arrays = {name: _mapped(folder / name, dtype) for name, dtype in _ARRAYS.items()}
        self.tokens, self.learnt, self.offsets = arrays["tokens"], arrays["learnt"], arrays["offsets"]
        self.learnt_counts, self.rows = arrays["learnt_counts"], arrays["rows"]

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / "facts.json").is_file()

    def __len__(self) -> int:
        """Units."""
        return len(self.rows) // self.facts.unit

    def sequence(self, number: int) -> Tokens:
        """Sequence `number`: views of the files."""
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return Tokens(self.tokens[part], self.learnt[part].view(bool))

    def unit(self, number: int) -> list[Tokens]:
        size = self.facts.unit
        return [self.sequence(size * number + i) for i in range(size)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[units] int64: tokens of each unit."""
        return self._by_unit(np.diff(self.offsets))

    @cached_property
    def learnt_lengths(self) -> np.ndarray:
        """[units] int64: tokens of each unit that are learnt."""
        return self._by_unit(self.learnt_counts.astype(np.int64))

    @property
    def unit_rows(self) -> np.ndarray:
        """[units] int64: the source's row of each unit."""
        return self.rows[:: self.facts.unit]

    def _by_unit(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, self.facts.unit).sum(1)


def _checksum(folder: Path, facts: Facts) -> str:
    """sha256 (hex) of the arrays in `folder` and of the other facts: about a second a gigabyte."""
    digest = hashlib.sha256(json.dumps({**asdict(facts), "sha256": ""}, sort_keys=True).encode())
    for name in _ARRAYS:
        digest.update(f"{name} {(folder / name).stat().st_size}\n".encode())
        with open_regular(folder / name) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
