"""The recipe's sections, but for `data` (config/data.py): every field with its type, default and meaning."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator, model_validator

from neuroada.config.section import Section, Text
from neuroada.errors import UserError
from neuroada.registry import ENGINES, METHODS

LARGEST = 1 << 31  # of counts: what torch and numpy index with, and more than anybody trains
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _all_linear(value: Any, names: Callable[[Any], list[str]]) -> Any:
    """PEFT's word for every Linear module, or names of some: one error for both, not one each."""
    return value if value == "all-linear" else names(value)


class Adapter(Section):
    """What is trained."""

    method: Annotated[str, AfterValidator(METHODS.check)] = Field(
        default="neuroada",
        description="neuroada, lora, dora, bitfit, shira, random_entries, supertuning, masked, full, head (a "
        "classifier alone), or an installed package's",
    )
    k: Positive = Field(
        default=20,
        description="trained connections of each neuron; of neuroada and masked; random_entries trains as many in all",
    )
    selection: Literal["magnitude", "gradient", "reverse", "random", "wanda", "lift"] = Field(
        default="magnitude", description="how the connections are chosen: docs/selection.md"
    )
    random_scope: Literal["layer", "block", "network"] | None = Field(
        default=None, description="of random_entries: what they are drawn over, without regard to neurons; null: layer"
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
    delta_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of neuroada: of the deltas and of AdamW's moments, in training; bf16 as in the authors' code, not "
        "under DeepSpeed",
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
        default="bf16", description="of the frozen weights and of the compute; of the deltas: adapter.delta_dtype"
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
        default=30,
        description="of a step, validation, selection pass or the start; then the job ends: a rank is probably lost",
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
