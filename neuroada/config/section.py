"""What every section of a recipe is."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _plain(text: str) -> str:
    """Names and paths go into messages, files and command lines."""
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{text[:60]!r}: must be a plain text of one line, not empty")
    return text


Text = Annotated[str, Field(max_length=4096), AfterValidator(_plain)]


class Section(BaseModel):
    """Strict: true is no number, and 3.0 no whole one."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
