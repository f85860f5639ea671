"""The operating system's errors, as one line a user can act on."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuroada.errors import UserError

_REMEDIES = {
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", "check the path"),
    errno.EISDIR: ("is a folder, not a file", "check the path"),
    errno.ELOOP: ("its symbolic links lead in a circle", "remove them"),
    errno.ENAMETOOLONG: ("its name is too long for this file system", "choose a shorter one"),
    errno.EACCES: ("permission denied", "change its permissions, or choose another place"),
    errno.EPERM: ("permission denied", "change its permissions, or choose another place"),
    errno.EROFS: ("its file system is read-only", "choose another place"),
    errno.ENOSPC: ("no space left on the disk", "free some and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some and run the same command again"),
    errno.EFBIG: ("larger than this file system or `ulimit -f` allows", "raise the limit, or choose another place"),
    errno.EMFILE: ("too many files are open", "raise `ulimit -n`"),
    errno.ESTALE: ("its network file system was mounted anew", "run the same command again"),
}


def as_user_error(error: OSError, path: Path | str, remedy: str | None = None) -> UserError:
    """`error`, met at `path`, as one line; `remedy` in place of the usual one."""
    reason, usual = _REMEDIES.get(error.errno or 0, (error.strerror or str(error), "check the path and the disk"))
    return UserError(f"{path}: {reason}; {remedy or usual}")


@contextmanager
def explained(path: Path | str, remedy: str | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a UserError about `path`; the OSError is its `__cause__`."""
    try:
        if b"\0" in os.fsencode(path):
            raise UserError(f"{str(path)!r}: a path cannot hold NUL; check the path")
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: no path of this file system; check the path") from None
    try:
        yield
    except OSError as error:
        raise as_user_error(error, path, remedy) from error
