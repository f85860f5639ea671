"""The CPU backend: the kernels in C++, compiled for this machine at their first use and called through ctypes.

The sources include no header of torch or Python, so a build takes a second instead of a minute and serves any version
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
from collections.abc import Callable
from pathlib import Path

import torch

from neuroada.errors import UserError
from neuroada.files import read_text, write_text

SOURCES = [Path(__file__).with_name(name) for name in ("sampled_gradient.cpp", "adapted_product.cpp", "vectors.h")]
# No -ffast-math: linked into a library, older gcc turns off denormals in the whole process (gcc bug 55522).
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
TOKENS = 128  # of a block, as in sampled_gradient.cpp
MULTIPLY_ADDS_PER_THREAD = 65536  # below this, waking another thread costs more than it saves
ACCUMULATE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


def cache_folder() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME/neuroada, or ~/.cache/neuroada."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuroada"


def build() -> Path:
    """Compile the kernels unless these sources, compiler and instruction set have been before. -> the library.

    The compiler is $CXX, or c++. OSError or CalledProcessError when there is none, or it cannot do it.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # Its predefined macros name the compiler's version and the machine's instruction set: a home folder shared by
    # unlike nodes must not hand one of them the other's code.
    macros = subprocess.run(
        [*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull], check=True, capture_output=True
    ).stdout
    text = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(text + macros + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{key}.so"
    stamp = library.with_suffix(".sha256")
    if not _whole(library, stamp):
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            partial = Path(scratch) / library.name
            sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
            subprocess.run(
                [*compiler, *FLAGS, *sources, "-o", str(partial)], check=True, capture_output=True, text=True
            )
            write_text(stamp, hashlib.sha256(partial.read_bytes()).hexdigest())
            partial.replace(library)
    return library


def _whole(library: Path, stamp: Path) -> bool:
    """Whether the library is what was built: one that a full disk cut off would end the process when it is used."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == read_text(stamp)
    except (OSError, UserError):
        return False


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, with one warning that gives the reason, where it cannot be built."""
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else error
        warnings.warn(
            f"no compiled CPU kernels, slower forms in plain torch are used ({reason}). "
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
    if common not in ACCUMULATE:
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


def adapted_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    idx_bytes: torch.Tensor,
    delta: torch.Tensor,
    library: ctypes.CDLL,
) -> torch.Tensor:
    """x [..., in], weight [out, in] with unit column stride, of one of ACCUMULATE's dtypes; bias [out] or None;
    idx_bytes [out, 2k] uint8; delta [out, k] -> [..., out] in x's dtype. None of the sizes is 0.

    IndexError when idx points outside of the weight. Decoding calls this for every layer of every token, so it is lean.
    """
    rows, columns = weight.shape
    accumulate = ACCUMULATE[x.dtype]
    # Copies keep a name until the call returns: a pointer alone would not keep them.
    wide, delta, idx_bytes = _as(x, accumulate), _as(delta, accumulate), _as(idx_bytes, torch.uint8)
    bias = None if bias is None else _as(bias, accumulate)
    y = wide.new_empty((*x.shape[:-1], rows))
    tokens = y.numel() // rows
    outside = _function(library, weight.dtype)(
        wide.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        None if bias is None else bias.data_ptr(),
        idx_bytes.data_ptr(),
        delta.data_ptr(),
        y.data_ptr(),
        tokens,
        rows,
        columns,
        delta.shape[1],
        max(1, min(torch.get_num_threads(), rows, tokens * rows * columns // MULTIPLY_ADDS_PER_THREAD)),
    )
    if outside:
        raise IndexError(f"idx points outside of a weight of {columns} columns")
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of this dtype, and contiguous."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


@functools.cache
def _function(library: ctypes.CDLL, dtype: torch.dtype) -> Callable[..., int]:
    function = getattr(library, f"adapted_product_{str(dtype).removeprefix('torch.')}")
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, pointer, size, *[pointer] * 4, *[size] * 4, ctypes.c_int]
    return function


def _unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself where a row is contiguous in memory (whatever the rows' distance), else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
