"""The recipe: everything that decides a run, validated as a whole before a weight is loaded."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from neuroada.errors import UserError
from neuroada.registry import ENGINES, METHODS

RECIPES = Path(__file__).parent / "recipes"

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


FREE = {"train": {"micro_batch_size", "packing", "activation_checkpointing", "log_every", "step_timeout_minutes"}}
"""What may change when a run is resumed: how a step is computed, not what it learns."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())


class Adapter(Section):
    """What is trained."""

    method: Annotated[str, AfterValidator(METHODS.check)] = Field(
        default="neuroada",
        description="neuroada, lora, shira, supertuning, masked, full, head (a classifier alone, its encoder frozen), "
        "or an installed package's",
    )
    k: Positive = Field(default=20, description="trained connections of each neuron; of neuroada and masked")
    selection: Literal["magnitude", "gradient", "reverse", "random"] = Field(
        default="magnitude", description="how the connections are chosen"
    )
    selection_file: str | None = Field(
        default=None, description="connections chosen before, by `neuroada select`; instead of `selection`"
    )
    target_modules: Annotated[list[str], Field(min_length=1)] = Field(
        description="names of Linear modules, or their ends after a dot"
    )
    target_parameters: list[str] | None = Field(
        default=None,
        description="of neuroada: names of experts' parameters of three dimensions, such as experts.gate_up_proj",
    )
    rank: Positive = Field(default=8, description="of lora; of shira, which then has as many trainable parameters")
    sparsity: Fraction = Field(default=0.99, description="of supertuning: the share of each weight that stays frozen")
    trainable_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the weights that full and masked train, and of their moments"
    )

    @property
    def selects_later(self) -> bool:
        """Whether the connections come after the model is loaded: from a file, or from a first batch's gradient."""
        return self.selection == "gradient" or self.selection_file is not None


class Optimizer(Section):
    """AdamW, betas (0.9, 0.999), eps 1e-8, as published."""

    lr: Annotated[float, Field(gt=0)] = Field(description="the highest learning rate, after the warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Fraction = Field(default=0.0, description="of all steps, linear from 0")
    schedule: Literal["linear", "constant"] = Field(
        default="linear", description="after the warm-up: linear to 0 at the last step, or constant"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="gradients are clipped to this norm; null: not clipped"
    )


class Train(Section):
    """How long, on how much at once, in which numbers."""

    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: Positive | None = Field(default=None, description="ends the run, and its schedule, earlier")
    global_batch_size: Positive = Field(
        default=16, description="sequences of an optimizer step, whatever the world size"
    )
    micro_batch_size: Positive = Field(
        default=2, description="sequences in one forward pass of a rank, at most; accumulation follows"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(default=512, description="tokens of prompt and answer together")
    packing: bool = Field(
        default=True, description="the sequences of a micro batch end to end in one row, without padding"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="of the frozen weights and of the compute; deltas are fp32"
    )
    seed: int = 42
    held_out: Annotated[int, Field(ge=0)] = Field(
        default=0, description="training questions left out, twice: as validation set and as test set"
    )
    activation_checkpointing: bool = Field(default=False, description="less memory for about a third more computation")
    log_every: Positive = Field(default=1, description="steps from one line of metrics.jsonl to the next")
    step_timeout_minutes: Annotated[float, Field(gt=0)] = Field(
        default=30, description="of one step, and of the start: then the job ends instead of waiting for a lost rank"
    )


class Checkpoint(Section):
    """Portable checkpoints: any engine and world size goes on from any other's."""

    every_steps: Positive = 200
    keep: Positive = Field(default=2, description="the newest checkpoints that are not removed")
    resume: Literal["auto", "never"] = Field(
        default="auto", description="auto: from output_dir's newest whole checkpoint"
    )


class Engine(Section):
    """What holds the model and runs a step."""

    name: Annotated[str, AfterValidator(ENGINES.check)] = Field(
        default="deepspeed", description="single, deepspeed or fsdp2"
    )
    ds_config: str = Field(default="zero2", description="of deepspeed: a file of ds_configs/, or a path")


class Evaluate(Section):
    """What is scored when training ends."""

    tasks: list[str] | None = Field(
        default=None, description="tasks to score; null: none, and of a glue/ task that task itself"
    )
    limit: Positive | None = Field(default=None, description="the first so many examples of each")
    frozen_base: bool = Field(
        default=False,
        description="of glue/ tasks: first train the classifier alone, and print its score beside the adapter's",
    )


class Recipe(Section):
    model: str = Field(description="hub id or folder")
    task: str = Field(description="what to train on: a row of the task table, see docs/tasks.md")
    data_dir: str = Field(default="data", description="holds <name>/{train,test}.json")
    adapter: Adapter
    optimizer: Optimizer
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()
    output_dir: str = Field(description="the run's folder")
    report_to: list[Literal["wandb"]] = Field(
        default=[], description="besides TensorBoard and metrics.jsonl, which are always written"
    )
    provenance: str = Field(description="where the values come from: published, or extrapolated from what")

    def share(self, world_size: int) -> int:
        """Sequences of a step that each of `world_size` ranks computes. UserError where the batch does not divide."""
        batch = self.train.global_batch_size
        if batch % world_size:
            ranks = max(n for n in range(1, world_size) if batch % n == 0)
            raise UserError(
                f"train.global_batch_size = {batch}: does not divide over {world_size} ranks; use {ranks} ranks, or a "
                f"batch that {world_size} divides"
            )
        return batch // world_size

    def micro_batch(self, world_size: int) -> int:
        """Sequences in one forward pass: the most that divide a rank's share, up to train.micro_batch_size."""
        share = self.share(world_size)
        return max(n for n in range(1, min(share, self.train.micro_batch_size) + 1) if share % n == 0)

    def micro_batches(self, world_size: int) -> int:
        """Micro batches a rank runs for one optimizer step."""
        return self.share(world_size) // self.micro_batch(world_size)

    def identity(self) -> dict[str, Any]:
        """The fields, by dotted name, that decide what is learnt: two runs that share them have the same curve."""
        deciding: dict[str, Any] = {"model": self.model, "task": self.task}
        for name in ("adapter", "optimizer", "train"):
            section = getattr(self, name).model_dump(exclude=FREE.get(name))
            deciding |= {f"{name}.{field}": value for field, value in section.items()}
        return deciding

    def save(self, path: Path) -> None:
        """Write the resolved recipe: this file alone reproduces the run."""
        path.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False))


def load_recipe(name: str, overrides: list[str] = []) -> Recipe:  # noqa: B006 (never changed)
    """A recipe by its name in recipes/ or its path, with dotted overrides such as `optimizer.lr=1e-3`.

    Raises:
        UserError: every error in one line: the field, its value, what would be right.
    """
    path = _find(name)
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: must be a mapping of fields, is {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"recipe {path.stem}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _find(name: str) -> Path:
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for path in (RECIPES / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise UserError(f"--recipe {name}: no such recipe in recipes/ and no such file; did you mean {', '.join(near)}?")


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: overrides are written key=value, such as optimizer.lr=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {parent} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not YAML") from None


def _explain(error: Any) -> str:
    """One error of pydantic's list: the field, its value, what would be right."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.4)
        return f"{field}: no such field; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{field}: missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{field} = {error['input']!r}: {error['msg'].lower()}"
