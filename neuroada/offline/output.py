"""A folder that appears whole or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuroada.errors import UserError

# What a model's folder holds beside its configuration and tokenizer: weights, in every format seen on the hub.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}


def check_new(out: Path) -> None:
    """Refuse to write over what is there."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: is already there; choose a new folder or remove it")


@contextmanager
def new_folder(out: Path, size: int) -> Iterator[Path]:
    """A folder `.NAME.partial` beside `out`, renamed to `out` when the block ends well and removed when it does not.

    What an interrupted run left there is removed first. UserError: `out` exists, or fewer than `size` bytes are free.
    """
    check_new(out)
    out = out.absolute()
    partial = out.parent / f".{out.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    existing = next(parent for parent in out.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"--out {out}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; choose another disk")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--out {out}: the disk filled up while writing; free {size / 1e9:.2f} GB") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def companions(folder: Path) -> list[Path]:
    """The model's other files: configuration, generation configuration, index, tokenizer, chat template, licence."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.startswith((".", "adapter_"))
    ]


def copy_companions(folder: Path, out: Path) -> None:
    for path in companions(folder):
        shutil.copyfile(path, out / path.name)
