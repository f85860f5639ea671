"""The CPU backend: sampled_gradient.cpp, compiled for this machine at its first use and called through ctypes.

The source includes no header of torch or Python, so a build takes a second instead of a minute and serves any version
of both. It is written to a private temporary name and renamed into the user's cache folder: ranks that start together
need no lock, and a killed build leaves nothing that another run could wait for.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("sampled_gradient.cpp")
# No -ffast-math: linked into a library, older gcc turns off denormals in the whole process (gcc bug 55522).
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
TOKENS = 128  # of a block, as in sampled_gradient.cpp
MULTIPLY_ADDS_PER_THREAD = 65536  # below this, waking another thread costs more than it saves


def cache_folder() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME/neuroada, or ~/.cache/neuroada."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuroada"


def build() -> Path:
    """Compile sampled_gradient.cpp unless this source, compiler and instruction set have been before. -> the library.

    The compiler is $CXX, or c++. OSError or CalledProcessError when there is none, or it cannot do it.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # Its predefined macros name the compiler's version and the machine's instruction set: a home folder shared by
    # unlike nodes must not hand one of them the other's code.
    macros = subprocess.run(
        [*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull], check=True, capture_output=True
    ).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + macros + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = cache_folder() / f"sampled_gradient-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            partial = Path(scratch) / library.name
            subprocess.run(
                [*compiler, *FLAGS, str(SOURCE), "-o", str(partial)], check=True, capture_output=True, text=True
            )
            partial.replace(library)
    return library


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, with one warning that gives the reason, where it cannot be built."""
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else error
        warnings.warn(
            f"sampled gradient: no compiled CPU kernel, the slower embedding_bag form is used ({reason}). "
            "A C++17 compiler with OpenMP (CXX, default c++) and a writable XDG_CACHE_HOME give it back.",
            stacklevel=2,
        )
        return None
    return library


def compiled(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor, library: ctypes.CDLL) -> torch.Tensor:
    """dy [tokens, out], x [tokens, in], idx [out, k] int64 -> [out, k] fp32 (float64 for float64).

    None of the sizes is 0. IndexError when idx points outside of x.
    """
    common = torch.promote_types(dy.dtype, x.dtype)
    if common not in (torch.float32, torch.bfloat16, torch.float64):
        common = torch.float32
    dy, x, idx = _unit_columns(dy.to(common)), _unit_columns(x.to(common)), idx.contiguous()
    tokens, columns = x.shape
    rows, k = idx.shape
    lowest, highest = torch.aminmax(idx)
    if lowest < 0 or highest >= columns:
        raise IndexError(f"idx reaches from {lowest} to {highest}, but x has {columns} columns")
    work = tokens * (rows * (k + 1) + columns)
    parts = min(torch.get_num_threads(), -(-tokens // TOKENS), -(-work // MULTIPLY_ADDS_PER_THREAD))
    accumulate = torch.promote_types(common, torch.float32)
    grad = torch.zeros(parts, rows, k, dtype=accumulate)
    scratch = torch.empty(parts, columns, TOKENS, dtype=accumulate)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    getattr(library, f"sampled_gradient_{str(common).removeprefix('torch.')}")(
        *(pointer(dy.data_ptr()), size(dy.stride(0)), pointer(x.data_ptr()), size(x.stride(0))),
        *(pointer(tensor.data_ptr()) for tensor in (idx, grad, scratch)),
        *(size(number) for number in (tokens, rows, columns, k)),
        ctypes.c_int(parts),
    )
    return grad[0] if parts == 1 else grad.sum(0)


def _unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself where a row is contiguous in memory (whatever the rows' distance), else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
