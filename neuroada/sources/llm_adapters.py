"""LLM-Adapters' public files: commonsense and arithmetic questions, at one commit of their repository.

llm_adapters.json lists each file's path there, rows, size and checksum. Seven large files carry the blob id that the
commit's tree records instead of a size and SHA-256. `variant` is another cut of a set that is accepted from a local
folder: commonsense_15k's 15,119 rows divided into train and validation.
"""

import shutil
from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import read_json, replacing
from neuroada.sources.download import Fingerprint, download, mismatch
from neuroada.sources.errors import NotInSource

MANIFEST = read_json(Path(__file__).with_name("llm_adapters.json"))
SETS: dict[str, dict[str, dict[str, Any]]] = MANIFEST["sets"]
RAW_URL = f"https://raw.githubusercontent.com/{MANIFEST['repository']}/{MANIFEST['commit']}"


def splits(name: str, source: Path | None) -> list[str]:
    """The splits of a set; one that only the variant has counts where `source` holds it."""
    own, variant = SETS[name]["files"], SETS[name].get("variant", {})
    return [*own, *(split for split in variant if split not in own and source and _find(source, name, split))]


def fetch_split(name: str, split: str, out: Path, source: Path | None) -> tuple[Path, str]:
    """Bring one file to `<out>/<name>/<split>.json`, from `source` if given, else from GitHub.

    Returns its path and what was done, in words. Raises UserError for a file that is not the published one, wherever
    it lies; a file of the user's is never overwritten.
    """
    target = out / name / f"{split}.json"
    if target.exists():
        return target, f"{_verified_rows(target, name, split):,} rows, already there"
    if source is None:
        entry = SETS[name]["files"][split]
        remedy = f"pass --from DIR, where DIR holds {name}/{split}.json or is a clone of {MANIFEST['repository']}"
        download(f"{RAW_URL}/{entry['path']}", target, _fingerprint(entry), remedy)
        return target, f"{entry['rows']:,} rows, downloaded"

    found = _find(source, name, split)
    if found is None:
        raise NotInSource(f"{name}/{split}.json")
    rows = _verified_rows(found, name, split)
    with replacing(target) as temporary:
        shutil.copyfile(found, temporary)
    return target, f"{rows:,} rows, copied from {found}"


def _find(source: Path, name: str, split: str) -> Path | None:
    """The file in a folder laid out like `data/`, or in a clone of the repository."""
    places = [source / name / f"{split}.json"]
    if split in SETS[name]["files"]:
        places.append(source / SETS[name]["files"][split]["path"])
    return next((place for place in places if place.is_file()), None)


def _verified_rows(path: Path, name: str, split: str) -> int:
    """Rows of a file that is the published one or its accepted variant; UserError if it is neither."""
    accepted = [files[split] for files in SETS[name].values() if split in files]
    differences = []
    for entry in accepted:
        difference = mismatch(path, _fingerprint(entry))
        if difference is None:
            return entry["rows"]
        differences.append(difference)
    raise UserError(
        f"{path} is not the published {name}/{split}.json: {', or '.join(differences)}; remove it or use another copy"
    )


def _fingerprint(entry: dict[str, Any]) -> Fingerprint:
    return Fingerprint(entry["size"], entry["checksum"])
