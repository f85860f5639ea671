"""report.html of a run."""

from pathlib import Path


def write_report(folder: Path) -> None:
    """Write `folder`/report.html."""
