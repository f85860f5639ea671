"""Every field as a Markdown table, made from the schema: docs/recipes.md and docs/tasks.md hold one, tests compare.

python -m neuroada.config.reference          # print the recipe's table
python -m neuroada.config.reference task     # a task file's
"""

import sys
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from neuroada.config.recipe import Recipe
from neuroada.config.task_file import TaskFile

HEADER = ("field", "type", "default", "meaning")


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every field, in the schema's order."""
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            section_type, several = inner
            yield from fields(section_type, f"{prefix}{name}{several}.")
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        yield f"`{prefix}{name}`", _type(schema["properties"][name]), default, field.description or ""


def table(section: type[BaseModel] = Recipe) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *fields(section)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _section(annotation: Any) -> tuple[type[BaseModel], str] | None:
    """(the section a field holds, "[]" if it holds a list of them); None for a plain field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for part in get_args(annotation):
        if (found := _section(part)) is not None:
            return found[0], "[]" if get_origin(annotation) is list else found[1]
    return None


def _type(schema: dict[str, Any]) -> str:
    """The type in words, from its JSON schema: "integer >= 1", "one of fp32, bf16", "list of string"."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "$ref" in schema:
        return "section"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), ", ".join(limits)]).strip()


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


if __name__ == "__main__":
    print(table(TaskFile if "task" in sys.argv[1:] else Recipe))
