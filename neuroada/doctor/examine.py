"""Runs checks one after the other. What one of them breaks costs the others nothing."""

import math
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from neuroada.doctor.check import Check, NotHere, Place
from neuroada.doctor.environment import read_environment
from neuroada.doctor.report import Report, Result
from neuroada.errors import Preempted
from neuroada.files import write_json


def examine(checks: Iterable[Check], place: Place, out: Path, tell: Callable[[str], object]) -> Report:
    """Run `checks` at `place` into the file `out`, written anew after each: it is there if one ends the process.

    tell: called with each check's name before it runs. UserError: `out` cannot be written.
    """
    report = Report(started=datetime.now(UTC).isoformat(timespec="seconds"), environment=read_environment())
    write_json(out, report.model_dump())
    for check in checks:
        tell(check.name)
        report.results.append(_run(check, place))
        write_json(out, report.model_dump())
    return report


def _run(check: Check, place: Place) -> Result:
    started = time.perf_counter()
    result = Result(name=check.name, claim=check.claim, number=check.number, status="FAIL", seconds=0.0)
    try:
        found = check.run(place)
        # A NaN is no number of JSON's, and must not pass.
        if math.isfinite(found.value):
            result.value, result.status = found.value, "PASS" if found.value <= found.limit else "FAIL"
        result.limit, result.numbers = found.limit, found.numbers
        result.detail = found.detail if result.value is not None else f"{found.value}; {found.detail}"
    except Preempted:
        raise
    except NotHere as reason:
        result.status, result.detail = "NOT HERE", str(reason)
    except torch.OutOfMemoryError as error:
        result.status, result.detail = "NOT HERE", f"the device's memory is too small or in use: {_line(error)}"
    except Exception as error:  # whatever a machine that nobody has seen provokes
        result.detail = f"{type(error).__name__}: {_line(error)}"
    result.seconds = round(time.perf_counter() - started, 3)
    return result


def _line(error: Exception) -> str:
    """The message in one line, without the folders of its paths: a report tells nothing of the machine's owner."""
    text = re.sub(r"(?<!\w)/(?:[^/\s'\":]+/)+", "", " ".join(str(error).split()))
    return text if len(text) <= 500 else f"{text[:250]} ... {text[-245:]}"
