"""The recipe: everything that decides a run, validated as a whole before a weight is loaded."""

import difflib
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from neuroada.config.data import Data
from neuroada.config.fields import Adapter, Base, Checkpoint, Engine, Evaluate, Objective, Optimizer, Train
from neuroada.config.section import Section, Text
from neuroada.errors import UserError
from neuroada.files import check_inside, check_schema, parse_yaml, read_yaml, write_yaml

RECIPES = Path(__file__).parent / "recipes"

FREE = {
    "adapter": {"kernel"},
    "train": {"micro_batch_size", "packing", "activation_checkpointing", "log_every", "step_timeout_minutes"},
}
"""What may change when a run is resumed: how a step is computed, not what it learns."""

LENGTH = {"epochs", "max_steps"}
"""Of train, besides, where the learning rate does not depend on them: so a finished run is extended."""


class Recipe(Section):
    model: Text = Field(description="hub id or folder")
    task: Text | None = Field(default=None, description="what to train on: a row of the task table, see docs/tasks.md")
    data: Data | None = Field(default=None, description="or own data, see docs/data.md")
    objective: Objective = Objective()
    data_dir: Text = Field(
        default="data", description="the folder that holds `NAME/train.json` and `NAME/test.json`, and encoded data"
    )
    base: Base = Base()
    adapter: Adapter
    optimizer: Optimizer
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()
    output_dir: Text = Field(description="the run's folder")
    report_to: list[Literal["wandb"]] = Field(
        default=[], description="besides TensorBoard and metrics.jsonl, which are always written"
    )
    provenance: str = Field(description="where the values come from: published, or extrapolated from what")

    @model_validator(mode="after")
    def _one_source(self) -> "Recipe":
        if (self.task is None) == (self.data is None):
            raise ValueError("task and data: give one of them, a built-in task or your own data")
        own = {
            "objective": self.objective != Objective(),
            "train.packing = fill": self.train.packing == "fill",
            "evaluate.every_steps": self.evaluate.every_steps is not None,
            "evaluate.samples": self.evaluate.samples > 0,
            "evaluate.early_stopping_patience": self.evaluate.early_stopping_patience is not None,
        }
        if self.data is None:
            for field in (name for name, given in own.items() if given):
                raise ValueError(f"{field} has no effect on a task; leave it out, or give data")
            return self
        if self.train.held_out:
            raise ValueError("train.held_out is of tasks; set data.validation.size")
        if self.data.streaming and self.train.packing == "fill":
            raise ValueError("train.packing = fill has to know all lengths, and a stream's are not; set it to true")
        if not (self.data.validation.size or self.data.validation.own_source):
            for field in (name for name, given in own.items() if given and name.startswith("evaluate.")):
                raise ValueError(f"{field} needs validation examples; set data.validation.size, split or path")
        return self

    @model_validator(mode="after")
    def _whole_means(self) -> "Recipe":
        if self.train.loss_average == "micro_batch" and self.train.global_batch_size % self.averaged:
            raise ValueError(
                f"train.micro_batch_size = {self.train.micro_batch_size}: with train.loss_average = micro_batch it "
                f"must divide train.global_batch_size = {self.train.global_batch_size}"
            )
        return self

    @property
    def trained_on(self) -> str:
        """The task's name, or "own data"."""
        return self.task or "own data"

    def share(self, world_size: int) -> int:
        """Sequences of a step that each of `world_size` ranks computes. UserError where the batch does not divide."""
        batch = self.train.global_batch_size
        if batch % world_size:
            ranks = max(n for n in range(1, min(world_size, batch + 1)) if batch % n == 0)
            raise UserError(
                f"train.global_batch_size = {batch}: does not divide over {world_size} ranks; use {ranks} ranks, or a "
                f"batch that {world_size} divides"
            )
        return batch // world_size

    def micro_batch(self, world_size: int) -> int:
        """Sequences in one forward pass: the most that divide a rank's share, up to train.micro_batch_size.

        With loss_average = micro_batch, the most that divide both, so that a pass is within one mean.
        """
        share = self.share(world_size)
        if self.train.loss_average == "micro_batch":
            return math.gcd(share, self.averaged)
        return max(n for n in range(1, min(share, self.train.micro_batch_size) + 1) if share % n == 0)

    @property
    def averaged(self) -> int:
        """With loss_average = micro_batch, the sequences of one mean."""
        return min(self.train.micro_batch_size, self.train.global_batch_size)

    def micro_batches(self, world_size: int) -> int:
        """Micro batches a rank runs for one optimizer step."""
        return self.share(world_size) // self.micro_batch(world_size)

    def identity(self) -> dict[str, Any]:
        """The fields, by dotted name, that decide what is learnt: two runs that share them have the same curve, as far
        as both go."""
        deciding: dict[str, Any] = {"model": self.model, "task": self.task}
        if self.data is not None:
            deciding |= {f"objective.{field}": value for field, value in self.objective.model_dump().items()}
        for name in ("base", "adapter", "optimizer", "train"):
            free = FREE.get(name, set()) | (LENGTH if name == "train" and self.optimizer.any_length else set())
            section = getattr(self, name).model_dump(exclude=free)
            deciding |= {f"{name}.{field}": value for field, value in section.items()}
        if self.train.loss_average == "micro_batch":
            deciding["train.micro_batch_size"] = self.averaged
        return deciding

    @property
    def exact(self) -> int:
        """Of a quantised base: how many entries of each row keep their value."""
        tuned = self.adapter.k if self.adapter.method == "neuroada" else 0
        return tuned if self.base.exact is None else self.base.exact

    def save(self, path: Path) -> None:
        """Write the resolved recipe: this file alone reproduces the run."""
        write_yaml(path, self.model_dump())


def load_recipe(name: str, overrides: list[str] = []) -> Recipe:  # noqa: B006 (never changed)
    """A recipe by its name in recipes/ or its path, with dotted overrides such as `optimizer.lr=1e-3`.

    Raises:
        UserError: every error in one line: the field, its value, what would be right.
    """
    path = _find(name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: must be a mapping of fields, is {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return check_schema(Recipe, values, f"recipe {path.stem}")


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run wrote. UserError as of `load_recipe`, and where a link leads out of the run's folder."""
    check_inside(path.parent, path)
    return check_schema(Recipe, read_yaml(path), str(path), "remove it, or choose another folder")


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
    values[last] = parse_yaml(text, f"{override[:200]!r}")
