"""The launcher's environment variables, read in one place: numbers that fit each other, or an error of one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from neuroada.errors import UserError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NNODES")
REMEDY = "unset it, or start with torchrun, deepspeed or sbatch"


def check_environment() -> None:
    """UserError where a variable is no number, RANK or WORLD_SIZE is set alone, or RANK is beyond WORLD_SIZE."""
    for name in NUMBERS:
        value = os.environ.get(name, "0")
        if not re.fullmatch(r"\d{1,7}", value, re.ASCII):
            raise UserError(f"{name} = {value!r} in the environment: must be a whole number; {REMEDY}")
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in os.environ and other not in os.environ and os.environ[name] not in ("0", "1"):
            raise UserError(f"{name} = {os.environ[name]} in the environment without {other}; {REMEDY}")
    if rank() >= world_size():
        raise UserError(f"RANK = {rank()} in the environment with WORLD_SIZE = {world_size()}; {REMEDY}")


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def world_size() -> int:
    return max(1, int(os.environ.get("WORLD_SIZE", "1"))) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Of this process among its node's; 0 without a launcher, whatever an earlier one left in the shell."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


@contextmanager
def joining() -> Iterator[None]:
    """While a process group is made: ranks that are not reached are one line."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError) as error:  # torch's DistError and its kin
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"rank {rank()} of {world_size()} does not reach the others at MASTER_ADDR:MASTER_PORT = {place} "
            f"({reason[:200]}); start all ranks by one launcher"
        ) from error
