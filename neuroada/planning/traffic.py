"""What a step computes and sends: exact counts of the large terms, no seconds."""

from dataclasses import dataclass
from typing import Any

from neuroada.config.recipe import Recipe
from neuroada.objectives import objective_class
from neuroada.planning.step import Parameter, Step
from neuroada.planning.strategies import share_of


@dataclass(frozen=True)
class Work:
    """One optimizer step. tokens: of the global batch, at most. flops: of all ranks. sent_bytes: by one rank.

    adapter_share: the part of sent_bytes that idx, base and delta are (the rest is the frozen base).
    """

    tokens: int
    flops: int
    sent_bytes: int
    adapter_share: float


def work(recipe: Recipe, config: Any, step: Step, strategy: str, world_size: int, shards: int) -> Work:
    """The work of one optimizer step under `strategy` on `world_size` ranks, every sequence at train.max_length.

    shards: of fsdp2, how many ranks share a sharded copy.
    """
    tokens = recipe.train.global_batch_size * recipe.train.max_length
    frozen, adapter = sent_bytes(step, strategy, world_size, recipe.micro_batches(world_size), shards)
    total = frozen + adapter
    return Work(tokens, step_flops(recipe, config, step), total, adapter / total if total else 0.0)


def step_flops(recipe: Recipe, config: Any, step: Step) -> int:
    """Multiplications and additions of the matrix products of one optimizer step.

    A weight costs 2 per token in forward and 2 for the gradient of its input; a trained entry 2 for its own gradient;
    of a mixture's experts a token meets as many as its router chooses. Activation checkpointing runs the decoder
    layers' forward again. Attention is counted whole, 4 x length x width per token and layer, 2.5 times that in
    backward. Embedding look-ups are free.
    """

    def met(param: Parameter) -> float:
        """Entries that a token is multiplied with."""
        if not param.experts:
            return param.entries
        return param.entries * getattr(config, "num_experts_per_tok", param.rows) / param.rows

    embeddings = config.vocab_size * config.hidden_size
    weights = [param for param in step.params if param.kind == "weights" and param.numel > param.rows]
    in_layers = sum(met(param) for param in weights if param.layer is not None)
    objective = objective_class(recipe.task, recipe.objective.name)
    head = embeddings if objective.vocabulary_head else 0  # tied or not, multiplied once
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * recipe.train.max_length * width * config.num_attention_heads * config.num_hidden_layers
    unmet = sum(param.entries - met(param) for param in step.params if param.trained)
    trained = step.trainable - unmet
    again = in_layers * 2 + attention if recipe.train.activation_checkpointing else 0
    per_token = 4 * (in_layers + head) + 2 * trained + 3.5 * attention + again
    return int(per_token * recipe.train.global_batch_size * recipe.train.max_length)


def sent_bytes(
    step: Step, strategy: str, world_size: int, micro_batches: int, shards: int | None = None
) -> tuple[int, int]:
    """(of the frozen base, of the adapter): bytes one rank sends for one optimizer step, by ring algorithms.

    A ring all-gather or reduce-scatter of B bytes sends B (N - 1) / N, an all-reduce twice that.
    zero0 reduces the gradients once; zero1 and zero2 reduce them (zero2: every micro batch) and gather the new deltas;
    zero3 and fsdp2 gather every parameter for forward and for backward of each micro batch and reduce-scatter its
    gradients; fsdp2 gathers what lies outside the decoder layers once. Where only `shards` ranks share a copy, they
    gather and reduce-scatter among themselves, and each sums its part of the gradients with the other copies'.
    """
    if world_size == 1:
        return 0, 0
    shards = shards or world_size
    trained = [param for param in step.params if param.trained]
    gradients = sum(4 * param.numel for param in trained)
    ring = _ring(world_size)
    if strategy == "zero0":
        return 0, int(2 * ring * gradients)
    if strategy in ("zero1", "zero2"):
        reductions = micro_batches if strategy == "zero2" else 1
        return 0, int(ring * gradients * (reductions + 1))

    def gathered(params: list[Parameter]) -> int:
        outside = inside = 0
        for param in params:
            padded = shards * share_of(param, shards, strategy) * param.itemsize
            outside, inside = (outside + padded, inside) if param.layer is None else (outside, inside + padded)
        return micro_batches * (2 * inside + (1 if strategy == "fsdp2" else 2) * outside)

    frozen = gathered([param for param in step.params if param.kind in ("weights", "mask")])
    adapter = gathered([param for param in step.params if param.kind in ("idx", "delta")])
    ring = _ring(shards)
    between = 2 * _ring(world_size // shards) * gradients / shards
    return int(ring * frozen), int(ring * (adapter + micro_batches * gradients) + micro_batches * between)


def _ring(ranks: int) -> float:
    """What a rank sends in a ring all-gather or reduce-scatter, as a part of the bytes that are moved."""
    return (ranks - 1) / ranks
