"""The recipe: everything that decides a run, validated as a whole before a weight is loaded."""

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator, model_validator

from neuroada.config.data import Data
from neuroada.config.section import Section, Text
from neuroada.errors import UserError
from neuroada.files import check_inside, check_schema, parse_yaml, read_yaml, write_yaml
from neuroada.registry import ENGINES, METHODS

RECIPES = Path(__file__).parent / "recipes"

LARGEST = 1 << 31  # of counts: what torch and numpy index with, and more than anybody trains
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


FREE = {
    "adapter": {"kernel"},
    "train": {"micro_batch_size", "packing", "activation_checkpointing", "log_every", "step_timeout_minutes"},
}
"""What may change when a run is resumed: how a step is computed, not what it learns."""

LENGTH = {"epochs", "max_steps"}
"""Of train, besides, where the learning rate does not depend on them: so a finished run is extended."""


def _all_linear(value: Any, names: Callable[[Any], list[str]]) -> Any:
    """PEFT's word for every Linear module, or names of some: one error for both, not one each."""
    return value if value == "all-linear" else names(value)


class Adapter(Section):
    """What is trained."""

    method: Annotated[str, AfterValidator(METHODS.check)] = Field(
        default="neuroada",
        description="neuroada, lora, dora, bitfit, shira, supertuning, masked, full, head (a classifier alone), "
        "or an installed package's",
    )
    k: Positive = Field(default=20, description="trained connections of each neuron; of neuroada and masked")
    selection: Literal["magnitude", "gradient", "reverse", "random", "wanda", "lift"] = Field(
        default="magnitude", description="how the connections are chosen: docs/selection.md"
    )
    calibration_examples: Positive | Literal["all"] = Field(
        default=8,
        description="of selections gradient and wanda: training examples they sum over; all: the whole training set",
    )
    lift_rank: Positive = Field(default=128, description="of selection lift: rank of the weight's approximation")
    selection_file: Text | None = Field(
        default=None, description="connections chosen before, by `neuroada select`; instead of `selection`"
    )
    neuron_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="of neuroada: the part of each layer's neurons that trains"
    )
    neuron_choice: Literal["random", "norm"] = Field(
        default="random",
        description="which neurons those are: any, by train.seed, or those whose weights have the largest L2 norm",
    )
    target_modules: Annotated[list[Text], Field(min_length=1), WrapValidator(_all_linear)] = Field(
        description="names of Linear modules, or their ends after a dot; all-linear: every one but the output layer"
    )
    exclude_modules: list[Text] = Field(
        default=[], description="names to leave out, read the same way; of neuroada, lora and dora"
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="numbers of the layers that are adapted; null: all; of neuroada, lora and dora"
    )
    target_parameters: list[Text] | None = Field(
        default=None,
        description="of neuroada: names of experts' parameters of three dimensions, such as experts.gate_up_proj",
    )
    rank: Positive = Field(
        default=8, description="of lora and dora; of shira, which then has as many trainable parameters"
    )
    lora_alpha: Positive | None = Field(
        default=None, description="of lora and dora: the change is scaled by lora_alpha / rank; null: 2 x rank"
    )
    sparsity: Fraction = Field(default=0.99, description="of supertuning: the share of each weight that stays frozen")
    kernel: Literal["auto", "triton", "dense"] = Field(
        default="auto",
        description="of neuroada on GPUs, for the deltas' gradient; auto: what rank 0 finds faster, on all ranks",
    )
    trainable_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the weights that full and masked train, and of their moments"
    )

    @property
    def selects_later(self) -> bool:
        """Whether the connections come after the model is loaded: from a file, or from training examples."""
        return self.by_examples or self.selection_file is not None

    @property
    def by_examples(self) -> bool:
        """Whether the connections are chosen by what training examples do in the model."""
        return self.selection in ("gradient", "wanda")


class Base(Section):
    """How the frozen Linear layers are stored (docs/quantised.md)."""

    model_dtype: Literal["nf4", "int8", "fp8"] | None = Field(
        default=None,
        description="of the weights inside the model's blocks; null: as the model's files have them",
    )
    exact: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="the largest entries of each row, which keep their bf16 value; null: of neuroada, adapter.k",
    )


class Optimizer(Section):
    """AdamW, betas (0.9, 0.999), eps 1e-8, as published."""

    lr: Annotated[float, Field(gt=0)] = Field(description="the highest learning rate, after the warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's, of the trainable parameters")
    warmup_ratio: Fraction = Field(default=0.0, description="of all steps, linear from 0")
    schedule: Literal["linear", "constant"] = Field(
        default="linear", description="after the warm-up: linear to 0 at the last step, or constant"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="gradients are clipped to this norm; null: not clipped"
    )

    @property
    def any_length(self) -> bool:
        """Whether a step's learning rate is the same in a run of any length."""
        return self.schedule == "constant" and not self.warmup_ratio


class Train(Section):
    """How long, on how much at once, in which numbers."""

    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = Field(default=3, description="passes over the training set")
    max_steps: Positive | None = Field(default=None, description="ends the run, and its schedule, earlier")
    global_batch_size: Positive = Field(
        default=16, description="sequences of an optimizer step, whatever the world size"
    )
    micro_batch_size: Positive = Field(
        default=2, description="sequences in one forward pass of a rank, at most; accumulation follows"
    )
    loss_average: Literal["batch", "micro_batch"] = Field(
        default="batch",
        description="batch: over all tokens (or texts) of a step; micro_batch: over those of each micro_batch_size "
        "sequences, in the order of training, and then over these means, as the authors' code does",
    )
    max_length: Annotated[int, Field(ge=8, le=1 << 24)] = Field(
        default=512, description="tokens of prompt and answer together"
    )
    packing: bool | Literal["fill"] = Field(
        default=True,
        description="the sequences of a micro batch end to end in one row, without padding; fill: besides, as many "
        "sequences as max_length tokens hold count as one of the batch (of own data)",
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="of the frozen weights and of the compute; deltas are fp32"
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = Field(
        default=42, description="of the order of the data, of dropout and of random choices"
    )
    held_out: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        default=0, description="training questions left out, twice: as validation set and as test set"
    )
    activation_checkpointing: bool = Field(default=False, description="less memory for about a third more computation")
    log_every: Positive = Field(default=1, description="steps from one line of metrics.jsonl to the next")
    step_timeout_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        default=30, description="of one step, and of the start: then the job ends instead of waiting for a lost rank"
    )

    @property
    def packed(self) -> bool:
        """Whether sequences lie end to end."""
        return self.packing is not False


class Objective(Section):
    """What own data teach."""

    name: Literal["sft", "dpo", "orpo"] = Field(
        default="sft", description="sft: the trained tokens of every example; dpo, orpo: preference pairs"
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="of dpo: the strength of the reference; of orpo: the weight of the odds ratio"
    )


class Checkpoint(Section):
    """Portable checkpoints: any engine and world size goes on from any other's."""

    every_steps: Positive = Field(default=200, description="steps from one checkpoint to the next")
    keep: Positive = Field(default=2, description="the newest checkpoints that are not removed")
    resume: Literal["auto", "never"] = Field(
        default="auto", description="auto: from output_dir's newest whole checkpoint"
    )


class Engine(Section):
    """What holds the model and runs a step."""

    name: Annotated[str, AfterValidator(ENGINES.check)] = Field(
        default="deepspeed", description="single, deepspeed or fsdp2"
    )
    ds_config: Text = Field(default="zero2", description="of deepspeed: a file of ds_configs/, or a path")
    shard_size: Positive | None = Field(
        default=None,
        description="of fsdp2: so many consecutive ranks, such as those of a node, share one sharded copy of the "
        "model; null: all ranks",
    )
    cpu_offload: bool = Field(
        default=False,
        description="of fsdp2: parameters, gradients and moments stay in host memory, and AdamW runs there",
    )

    @model_validator(mode="after")
    def _of_fsdp2(self) -> "Engine":
        given = {"shard_size": (self.shard_size, "zero3_hpz"), "cpu_offload": (self.cpu_offload, "zero3_offload")}
        for field, (value, ds_config) in given.items():
            if value and self.name != "fsdp2":
                raise ValueError(
                    f"engine.{field} = {str(value).lower()}: is of fsdp2, not of {self.name}; set engine.name=fsdp2, "
                    f"or leave it out (of deepspeed: engine.ds_config={ds_config})"
                )
        return self

    def shards(self, world_size: int) -> int:
        """Ranks that share one sharded copy of the model under fsdp2. UserError where they do not divide all ranks."""
        size = self.shard_size or world_size
        if world_size % size:
            raise UserError(
                f"engine.shard_size = {size}: does not divide {world_size} ranks; set it to the ranks of a node"
            )
        return size


class Evaluate(Section):
    """What is scored, while own data are trained on and when training ends."""

    every_steps: Positive | None = Field(
        default=None, description="steps between measurements of data.validation; null: the end of every epoch"
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        default=0, description="validation prompts that are answered at every measurement, to read"
    )
    early_stopping_patience: Positive | None = Field(
        default=None, description="the run ends after so many measurements without a better one"
    )

    tasks: list[Text] | None = Field(
        default=None,
        description="tasks to score: names, task files, lm_eval:NAME (docs/tasks.md); null: none, and of a glue/ task "
        "that task itself",
    )
    limit: Positive | None = Field(default=None, description="the first so many examples of each")
    frozen_base: bool = Field(
        default=False,
        description="of glue/ tasks: first train the classifier alone, and print its score beside the adapter's",
    )


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
            ranks = max(n for n in range(1, world_size) if batch % n == 0)
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
