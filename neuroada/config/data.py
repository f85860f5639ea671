"""The `data:` section of a recipe: which files a run learns from, and how their rows become tokens."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from neuroada.config.section import Section

FormatName = Literal["chat", "prompt_completion", "alpaca", "text", "preference"]


class Columns(Section):
    """Which column of the data holds what, where it is not named as the format expects."""

    messages: str | None = Field(
        default=None, description="chat: the list of turns (messages, conversations or conversation)"
    )
    role: str | None = Field(default=None, description="chat: the key of a turn that says who speaks (role or from)")
    content: str | None = Field(
        default=None, description="chat: the key of a turn that holds its text (content or value)"
    )
    tools: str | None = Field(default=None, description="chat: the tools a model may call, as a list or as JSON text")
    system: str | None = Field(
        default=None, description="chat, alpaca: the system turn, where it has a column of its own"
    )
    prompt: str | None = Field(default=None, description="prompt_completion, preference: text or turns that are given")
    completion: str | None = Field(default=None, description="prompt_completion: text or turns to learn")
    instruction: str | None = Field(default=None, description="alpaca: what is asked")
    input: str | None = Field(default=None, description="alpaca: what the instruction is about; may be empty")
    output: str | None = Field(default=None, description="alpaca: the answer to learn")
    text: str | None = Field(default=None, description="text: the text to learn")
    chosen: str | None = Field(default=None, description="preference: the better answer, as text or turns")
    rejected: str | None = Field(default=None, description="preference: the worse answer, as text or turns")


class Roles(Section):
    """The names that a chat file gives to those who speak."""

    system: list[str] = Field(default=["system", "developer"], description="names of the system turn's role")
    user: list[str] = Field(default=["user", "human", "prompter"], description="names of the user's role")
    assistant: list[str] = Field(
        default=["assistant", "gpt", "bot", "chatgpt", "model"], description="names of the model's"
    )
    tool: list[str] = Field(
        default=["tool", "observation", "function_response"], description="names of a tool's answers"
    )

    @model_validator(mode="after")
    def _one_meaning(self) -> "Roles":
        seen: dict[str, str] = {}
        for role, names in self:
            for name in names:
                if name in seen:
                    raise ValueError(f"{name!r} stands under both {seen[name]} and {role}; a name has one role")
                seen[name] = role
        return self


class Dataset(Section):
    """One source of examples."""

    path: str = Field(description="file, glob, folder (json, jsonl, parquet, arrow, csv, txt, or saved) or hub name")
    name: str | None = Field(default=None, description="configuration of a hub data set that has several")
    split: str = Field(default="train", description="split of a hub data set or of a folder that has splits")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub data set")
    type: FormatName | None = Field(
        default=None, description="format of the rows; recognised from the columns when left out"
    )
    columns: Columns = Field(default=Columns(), description="columns that are named otherwise than the format expects")
    roles: Roles = Field(default=Roles(), description="role names of a chat that are not the usual ones")
    ignore_columns: list[str] = Field(default=[], description="filled columns that are left unread on purpose")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="share of this source in every step, relative to the others'; of mix: interleave"
    )


class Validation(Section):
    """Examples that are not trained on, to measure the loss on."""

    path: str | None = Field(default=None, description="a file of its own, in the first data set's format")
    split: str | None = Field(default=None, description="split of `path`, or of the first data set, to take them from")
    size: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="without path and split: examples held out of training; with them: at most so many, 0 for all",
    )

    @property
    def own_source(self) -> bool:
        """Whether the examples come from another file or split than those of training."""
        return self.path is not None or self.split is not None


class Data(Section):
    """Own data, instead of a task."""

    datasets: Annotated[list[Dataset], Field(min_length=1)] = Field(description="the sources, read in this order")
    chat_template: str = Field(default="tokenizer", description="tokenizer: the model's own; or a .jinja file")
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = Field(
        default="assistant",
        description="tokens with a loss: every assistant turn, the last one, the completion (of rows that have "
        "one), or all tokens; text is always trained on whole",
    )
    train_on_eos: Literal["turn", "last", "none"] = Field(
        default="turn", description="end-of-turn tokens with a loss: of every trained turn, of the last one, or none"
    )
    excess_length: Literal["drop", "truncate", "split", "error"] = Field(
        default="drop",
        description="an example longer than train.max_length tokens: left out, cut at its end, divided into several, "
        "or refused; text is always divided",
    )
    mix: Literal["concat", "interleave"] = Field(
        default="concat", description="concat: every example once an epoch; interleave: sources by weight in every step"
    )
    streaming: bool = Field(
        default=False,
        description="read hub data as it comes, without a copy on disk, and only as much as train.max_steps needs; "
        "shuffled in blocks",
    )
    validation: Validation = Field(default=Validation(), description="examples to measure the loss on")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="a bad row ends the run, or is left out and listed"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        weights = [dataset.weight for dataset in self.datasets]
        if self.mix == "concat" and any(weight is not None for weight in weights):
            raise ValueError("datasets.weight has no effect with mix: concat; set mix: interleave, or drop the weights")
        if self.train_on == "all" and self.train_on_eos != "turn":
            raise ValueError("train_on_eos has no effect with train_on: all; leave it out")
        if self.streaming and self.validation.size and not self.validation.own_source:
            raise ValueError("validation.size: nothing can be held out of a stream; set validation.split or path")
        kinds = {dataset.type == "preference" for dataset in self.datasets if dataset.type}
        if len(kinds) > 1:
            raise ValueError("datasets: preference pairs cannot be mixed with other formats; train on them separately")
        return self
