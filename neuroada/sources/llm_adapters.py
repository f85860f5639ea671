"""LLM-Adapters' public files: commonsense and arithmetic questions, at one commit of their repository.

llm_adapters.json lists each file's path there, rows, size and checksum. Seven large files carry the blob id that the
commit's tree records instead of a size and SHA-256. `variant` is how the NeuroAda authors divided a set into train and
validation: commonsense_15k's 15,119 rows into 10,583 to train on and 4,536 to score. The division is made here from the
public file, and its files are checked like any other.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import read_json, replacing, write_text
from neuroada.sources.download import Fingerprint, download, mismatch
from neuroada.sources.errors import NotInSource

MANIFEST = read_json(Path(__file__).with_name("llm_adapters.json"))
SETS: dict[str, dict[str, dict[str, Any]]] = MANIFEST["sets"]
SEED, TRAIN_SHARE = 42, 0.7
"""Of a divided set: Python's shuffle of all rows, then so many of them train."""

RAW_URL = f"https://raw.githubusercontent.com/{MANIFEST['repository']}/{MANIFEST['commit']}"


def splits(name: str) -> list[str]:
    """The splits that a set is stored in."""
    return [*SETS[name].get("variant", SETS[name]["files"])]


def fetch_split(name: str, split: str, out: Path, source: Path | None) -> tuple[Path, str]:
    """Bring one file to `<out>/<name>/<split>.json`, from `source` if given, else from GitHub.

    Returns its path and what was done, in words. Raises UserError for a file that is not the published one, wherever
    it lies; a file of the user's is never overwritten.
    """
    target = out / name / f"{split}.json"
    if target.exists():
        return target, f"{_verified_rows(target, name, split):,} rows, already there"
    if "variant" in SETS[name]:
        return _fetch_divided(name, split, target, source)
    if source is None:
        entry = SETS[name]["files"][split]
        _download(name, split, target)
        return target, f"{entry['rows']:,} rows, downloaded"

    found = _find(source, name, split)
    if found is None:
        raise NotInSource(f"{name}/{split}.json")
    return target, f"{_copy(found, target, name, split):,} rows, copied from {found}"


def _fetch_divided(name: str, split: str, target: Path, source: Path | None) -> tuple[Path, str]:
    """A copy of the part that lies in `source`; else the public file divided, which stays beside it if downloaded."""
    copy = source / name / f"{split}.json" if source else None
    if copy is not None and copy.is_file() and mismatch(copy, _entry(name, split)) is None:
        return target, f"{_copy(copy, target, name, split):,} rows, copied from {copy}"
    if source is None:
        whole = target.with_name(f"{name}.json")
        if not whole.is_file():
            _download(name, "train", whole)
    elif (found := _find(source, name, "train")) is not None:
        whole = found
    else:
        raise NotInSource(f"{name}/{split}.json")
    published = SETS[name]["files"]["train"]
    if difference := mismatch(whole, _fingerprint(published)):
        raise UserError(f"{whole} is not the published {name}: {difference}; remove it or use another copy")
    rows = read_json(whole, limit=1 << 30)
    random.Random(SEED).shuffle(rows)
    end = int(len(rows) * TRAIN_SHARE)
    part = rows[:end] if split == "train" else rows[end:]
    write_text(target, json.dumps(part, ensure_ascii=False, indent=4))
    return target, f"{_verified_rows(target, name, split):,} rows of {len(rows):,}, divided as the authors did"


def _download(name: str, split: str, target: Path) -> None:
    entry = SETS[name]["files"][split]
    remedy = f"pass --from DIR, where DIR holds {name}/{split}.json or is a clone of {MANIFEST['repository']}"
    download(f"{RAW_URL}/{entry['path']}", target, _fingerprint(entry), remedy)


def _copy(found: Path, target: Path, name: str, split: str) -> int:
    """Copy a file that is what it should be; returns its rows."""
    rows = _verified_rows(found, name, split)
    with replacing(target) as temporary:
        shutil.copyfile(found, temporary)
    return rows


def _find(source: Path, name: str, split: str) -> Path | None:
    """The public file in a folder laid out like `data/`, or in a clone of the repository."""
    places = (source / name / f"{split}.json", source / SETS[name]["files"][split]["path"])
    return next((place for place in places if place.is_file()), None)


def _entry(name: str, split: str) -> Fingerprint:
    """What the stored file of a set must be."""
    return _fingerprint(SETS[name].get("variant", SETS[name]["files"])[split])


def _verified_rows(path: Path, name: str, split: str) -> int:
    """Rows of a file that is what a set stores; UserError if it is another."""
    difference = mismatch(path, _entry(name, split))
    if difference is not None:
        raise UserError(f"{path} is not the published {name}/{split}.json: {difference}; remove it or use another copy")
    rows: int = SETS[name].get("variant", SETS[name]["files"])[split]["rows"]
    return rows


def _fingerprint(entry: dict[str, Any]) -> Fingerprint:
    return Fingerprint(entry["size"], entry["checksum"])
