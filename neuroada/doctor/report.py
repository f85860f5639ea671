"""doctor.json, and its table."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from neuroada.doctor.environment import Environment


class Result(BaseModel):
    """A check's result. value, limit: None where it did not come to a number; then `detail` says why."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    claim: str
    status: Literal["PASS", "FAIL", "NOT HERE"]
    number: str
    value: float | None = None
    limit: float | None = None
    seconds: float
    detail: str = ""
    numbers: dict[str, float] = {}


class Report(BaseModel):
    """doctor.json. No host name, no user and no path, unless the message of a failure holds one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    started: str
    environment: Environment
    results: list[Result] = []

    @property
    def failed(self) -> list[str]:
        return [result.name for result in self.results if result.status == "FAIL"]


def table(report: Report) -> Table:
    """Environment and checks as one table: name, status, number beside its limit, seconds, detail."""
    view = Table(title="neuroada doctor", show_lines=False)
    for name in ("check", "status", "found", "limit", "seconds"):
        view.add_column(name, no_wrap=True, justify="left" if name in ("check", "status") else "right")
    view.add_column("detail", overflow="fold")
    for name, text in report.environment.lines():
        view.add_row(name, "", "", "", "", text)
    view.add_section()
    for result in report.results:
        numbers = ("" if number is None else f"{number:.3g}" for number in (result.value, result.limit))
        told = result.detail if result.value is None else f"{result.number}; {result.detail}".removesuffix("; ")
        view.add_row(result.name, result.status, *numbers, f"{result.seconds:.1f}", told)
    return view
