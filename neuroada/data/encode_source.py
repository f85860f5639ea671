"""One source, from its rows to a store: read, checked, encoded once, kept under a hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from neuroada.config.data import Data, Dataset
from neuroada.data.chat import ChatTemplate
from neuroada.data.encode_rows import RowEncoder, encode_rows
from neuroada.data.encoding import Counts, Encoder, Tokens
from neuroada.data.formats import RowError, RowReader, make_reader
from neuroada.data.sources import Source, find_source
from neuroada.data.storage import LISTED, Facts, Store, Writer
from neuroada.errors import UserError
from neuroada.files import explained
from neuroada.tasks.encode import tokenizer_fingerprint

_VERSION = "1"  # of the stored form and of the rules that lead to it: raise it when either changes


class SourceEncoder:
    """Encodes sources with one tokenizer and one `data:` section into at most `max_length` tokens a sequence."""

    def __init__(self, data: Data, tokenizer: Any, max_length: int, cache_dir: Path) -> None:
        self.data, self.tokenizer, self.max_length, self.cache_dir = data, tokenizer, max_length, cache_dir
        self.template = self._template()
        self._settings = [
            _VERSION,
            tokenizer_fingerprint(tokenizer),
            self.template.identity() if self.template else None,
            max_length,
            data.model_dump(include={"train_on", "train_on_eos", "excess_length", "on_bad_row"}),
        ]

    def _template(self) -> ChatTemplate | None:
        """None where the tokenizer has none and no file is named: then only text and prompt_completion can be read."""
        if self.data.chat_template == "tokenizer" and self.tokenizer.chat_template is None:
            return None
        return ChatTemplate(self.tokenizer, self.data.chat_template)

    def identity(self, source: Source) -> str:
        """A hash of all that decides the tokens of a source."""
        spec = source.spec.model_dump(exclude={"path", "weight", "revision"})
        return digest([*self._settings, spec, source.fingerprint()])

    def __call__(self, spec: Dataset, limit: int | None = None) -> tuple[Store, str]:
        """The store of `spec` and its identity. limit: the first so many units of it, and no more of it is read.

        Several processes may ask at once: the first encodes, the others wait and map its files.
        """
        source = find_source(spec, self.data.streaming)
        identity = self.identity(source)
        folder = self.cache_dir / (identity[:32] + (f"-{limit}" if limit is not None else ""))
        if (store := _stored(folder)) is not None:
            return store, identity
        with explained(self.cache_dir):
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(self.cache_dir / f".{folder.name}.lock"):
                if _stored(folder) is None:
                    self._encode(source, folder, limit)
        return Store(folder), identity

    def first(self, spec: Dataset, rows: int) -> list[tuple[str, list[list[Tokens]]]]:
        """(where it stands, its units) of the first good rows, whole: max_length does not count here."""
        encode = self._row_encoder(spec, sys.maxsize)
        found: list[tuple[str, list[list[Tokens]]]] = []
        for row in find_source(spec, self.data.streaming).rows():
            if len(found) == rows:
                break
            for where, units in encode([row]).rows:
                if isinstance(units, RowError):
                    self._bad(where, units, Facts())
                else:
                    found.append((where, units))
        return found

    def _encode(self, source: Source, folder: Path, limit: int | None) -> None:
        encode, facts, counts = self._row_encoder(source.spec, self.max_length), Facts(), Counts()
        with Writer(folder) as writer, closing(encode_rows(encode, source.rows())) as chunks:
            for chunk in chunks:
                counts.add(chunk.counts)
                for row, (where, units) in enumerate(chunk.rows, facts.rows):
                    if isinstance(units, RowError):
                        self._bad(where, units, facts)
                        continue
                    for unit in units:
                        if limit is None or writer.units < limit:
                            writer.add(unit, row)
                facts.rows += len(chunk.rows)
                if limit is not None and writer.units >= limit:
                    break
            if not facts.rows:
                raise UserError(f"data.datasets: {source.spec.path}: no rows; give it at least one")
            if encode.reader is not None:
                facts.format = encode.reader.name
                facts.unit = 2 if facts.format == "preference" else 1
            facts.take(counts)
            writer.finish(facts)

    def _row_encoder(self, spec: Dataset, max_length: int) -> RowEncoder:
        return RowEncoder(Encoder(self.tokenizer, self.data, max_length, self.template), partial(self._reader, spec))

    def _reader(self, spec: Dataset, first: Any) -> RowReader:
        if not isinstance(first, dict):
            raise RowError(f"a {type(first).__name__}, expected an object with named columns")
        return make_reader(spec, first, self.template is not None)

    def _bad(self, where: str, error: RowError, facts: Facts) -> None:
        if self.data.on_bad_row == "error":
            raise UserError(f"{where}: {error}")
        facts.skipped += 1
        if len(facts.skipped_rows) < LISTED:
            facts.skipped_rows.append(f"{where}: {error}")


def _stored(folder: Path) -> Store | None:
    """The store in `folder`; None where there is none, or, with a warning, a damaged one."""
    if not Store.exists(folder):
        return None
    try:
        return Store(folder)
    except UserError as error:
        warnings.warn(f"encoded again: {error}", stacklevel=2)
        return None


def digest(value: Any) -> str:
    """sha256 (hex) of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
