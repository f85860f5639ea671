"""A task file: which questions are asked, how they are put, and how an answer is judged. docs/tasks.md explains it."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from neuroada.config.section import Section, Text

RuleName = Literal["exact", "contains", "regex", "number", "multiple_choice"]


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"answer.pattern = {pattern!r}: no regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"answer.pattern = {pattern!r}: has {groups} groups (...); give one, around the answer")
    return pattern


class AnswerRule(Section):
    """How an answer is read and compared with the target."""

    rule: RuleName = Field(
        description="exact: all that is generated, less blanks around it; contains: the target stands in it; regex: "
        "the first match's group; number: the number it states, or its last one; multiple_choice: the likeliest option"
    )
    pattern: Annotated[str, AfterValidator(_one_group)] | None = Field(
        default=None, description="of regex: with one group, which is the answer"
    )
    options: Text | None = Field(default=None, description="of multiple_choice: the column that lists the options")
    target_is: Literal["text", "index", "number", "letter"] = Field(
        default="text",
        description="of multiple_choice, how the target names its option: its text, its index (from 0), number (from "
        "1) or letter (from A)",
    )
    length_normalised: bool = Field(
        default=False, description="of multiple_choice: log-probabilities are compared per token, not in sum"
    )

    @model_validator(mode="after")
    def _fits(self) -> "AnswerRule":
        if (self.pattern is not None) != (self.rule == "regex"):
            raise ValueError(f"answer.pattern: is of rule: regex, which needs it; the rule is {self.rule}")
        if (self.options is not None) != (self.rule == "multiple_choice"):
            raise ValueError(f"answer.options: is of rule: multiple_choice, which needs it; the rule is {self.rule}")
        if self.rule != "multiple_choice":
            for field in ("target_is", "length_normalised"):
                if field in self.model_fields_set:
                    raise ValueError(f"answer.{field} has no effect on rule: {self.rule}; leave it out")
        return self


def _rule_alone(value: Any) -> Any:
    """`answer: exact` is `answer: {rule: exact}`."""
    return {"rule": value} if isinstance(value, str) else value


class TaskFile(Section):
    """A task of one's own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$")] | None = Field(
        default=None, description="in results.json; null: the file's name without its suffix"
    )
    path: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description="file, glob, folder or hub name, or a list of them; from the working directory"
    )
    split: Text | None = Field(default=None, description="of a hub data set or a folder; null: test")
    config: Text | None = Field(default=None, description="configuration of a hub data set that has several")
    revision: Text | None = Field(default=None, description="branch, tag or commit of a hub data set")
    prompt: Annotated[str, Field(min_length=1)] = Field(
        description="what the model is given; {column} stands for a column's value, {{ and }} for braces"
    )
    target: Annotated[str, Field(min_length=1)] = Field(description="the right answer, written like the prompt")
    chat_template: Text | None = Field(
        default=None,
        description="the prompt is a user's turn of a chat, rendered by: tokenizer, the model's own template; or a "
        ".jinja file. null: the prompt as it stands",
    )
    system: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="of chat_template: the turn before it, written like the prompt or a plain text"
    )
    answer: Annotated[AnswerRule, BeforeValidator(_rule_alone)]
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        default=64, description="tokens that are generated at most; not of multiple_choice"
    )

    @model_validator(mode="after")
    def _fits(self) -> "TaskFile":
        if self.answer.rule == "multiple_choice" and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_new_tokens has no effect on rule: multiple_choice; leave it out")
        if self.system is not None and self.chat_template is None:
            raise ValueError("system: is a turn of a chat; set chat_template, or leave it out")
        return self
