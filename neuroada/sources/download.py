"""One file over HTTP: resumed where it was cut off, verified, and only then given its name."""

import hashlib
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from tqdm import tqdm

from neuroada.errors import UserError
from neuroada.files import FolderLock, open_regular

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class Fingerprint:
    """What a file must be.

    `size` in bytes, None where it is not recorded. `checksum` is `sha256:<hex>`, or `git-blob:<hex>`: the id under
    which git stores the content, which its repository's tree at a commit vouches for (it covers the length too).
    """

    size: int | None
    checksum: str


def checksum(path: Path, algorithm: str) -> str:
    """`algorithm:<hex>` of the file's content, for the two algorithms of a Fingerprint."""
    if algorithm == "git-blob":  # SHA-1 over "blob <size>\0" and the content: `git hash-object`
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        digest = hashlib.new(algorithm)
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"{algorithm}:{digest.hexdigest()}"


def mismatch(path: Path, expected: Fingerprint) -> str | None:
    """How the file differs from `expected`, in words; None if it does not."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"expected {expected.size:,} bytes, found {size:,}"
    found = checksum(path, expected.checksum.partition(":")[0])
    if found != expected.checksum:
        return f"expected {expected.checksum}, found {found} ({size:,} bytes)"
    return None


def download(url: str, target: Path, expected: Fingerprint, remedy: str) -> None:
    """Bring `url` to `target` by way of `<target>.part`, which a later call takes up where this one ended.

    A connection that breaks is opened again for as long as each brings new bytes. `remedy` ends the UserError that is
    raised when the server cannot be reached or refuses. A file that arrives different from `expected` is removed. The
    target's folder is locked meanwhile: two would write into each other's part.
    """
    with FolderLock(target.parent):
        _download(url, target, expected, remedy)


def _download(url: str, target: Path, expected: Fingerprint, remedy: str) -> None:
    part = target.with_name(target.name + ".part")
    have, cause = -1, None
    while (size := part.stat().st_size if part.exists() else 0) > have:
        have = size
        try:
            if _receive(url, part, have):
                break
        except HTTPError as error:
            if error.code == 416:  # nothing after our last byte: the .part is whole, or wrong, as the checksum will say
                break
            raise UserError(f"could not download {url} ({error}): {remedy}") from error
        except (OSError, HTTPException) as error:
            cause = error
    else:
        reason = getattr(cause, "reason", cause) or "the connection closed early"
        raise UserError(f"could not download {url} ({reason}): run again to resume, or {remedy}")

    if difference := mismatch(part, expected):
        part.unlink()
        raise UserError(f"{url}: {difference}; the download was removed: run again, or {remedy}")
    part.replace(target)


def _receive(url: str, part: Path, have: int) -> bool:
    """Append what follows byte `have` to `part` (from the start if the server knows no ranges); True if it is whole."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        start = have if response.status == 206 else 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total
