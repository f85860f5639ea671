"""The plan of a recipe: one rank's memory under every strategy, the work of a step, and the strategy for a card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada.config.ds_config import read_ds_config, zero_options
from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.hf.config import find_config
from neuroada.methods import make_method
from neuroada.planning.frozen import Frozen
from neuroada.planning.step import Step, record_step
from neuroada.planning.strategies import STRATEGIES, Memory, memory, shard_ranks
from neuroada.planning.traffic import Work, work
from neuroada.registry import METHODS

GIB = 2**30
CONTEXT_BYTES = GIB  # CUDA's context, the libraries' workspaces and NCCL's buffers
FRAGMENTATION = 1.05  # of the allocator, over the bytes alive

# zero0 is for comparison: no engine runs it. Its memory is that of one process.
_RUNNABLE = tuple(name for name in STRATEGIES if name not in ("single", "zero0"))


@dataclass(frozen=True)
class RankPlan:
    """One rank under one strategy. fits: None where no card was named."""

    world_size: int
    strategy: str
    memory: Memory
    work: Work
    fits: bool | None

    def as_json(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "strategy": self.strategy,
            "peak_bytes": self.memory.peak_bytes,
            "by_kind": self.memory.by_kind,
            "fits": self.fits,
            "host_bytes": self.memory.host_bytes,
            "tokens_per_step": self.work.tokens,
            "flops_per_step": self.work.flops,
            "sent_bytes_per_step": self.work.sent_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """Every strategy for a recipe on `world_size` ranks. chosen: the one that is recommended for the card, or, where no
    card was named, the recipe's own."""

    recipe: Recipe
    config_origin: str
    step: Step
    ranks: list[RankPlan]
    chosen: RankPlan

    @property
    def trainable(self) -> int:
        return self.step.trainable

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return sum(param.entries for param in self.step.params if param.kind == "weights")

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: every trained entry and its two moments, fp32."""
        return 12 * self.trainable


def make_plan(recipe: Recipe, world_size: int, card_bytes: float | None = None) -> Plan:
    """Plan `recipe` on `world_size` ranks, of cards with `card_bytes` each.

    Raises:
        UserError: the model's configuration is nowhere, the batch does not divide over the ranks, or no strategy fits
            the card; then it says what would.
    """
    own, options = own_strategy(recipe, world_size)
    if (reason := make_method(recipe).refusal(own)) is not None:
        raise UserError(reason)
    recipe = recipe.model_copy(deep=True)
    recipe.train.micro_batch_size = recipe.micro_batch(world_size)
    accumulating = recipe.micro_batches(world_size) > 1
    config, origin = find_config(recipe.model)
    step = record_step(recipe, config, accumulating)
    names = _runnable(recipe, world_size)
    if world_size > 1:
        names.insert(0, "zero0")
    ranks = [rank_plan(recipe, config, step, name, world_size, card_bytes) for name in names]
    chosen = next((rank for rank in ranks if rank.strategy == own and options is None), None)
    if chosen is None and (card_bytes is None or own == "fsdp2"):
        chosen = rank_plan(recipe, config, step, own, world_size, card_bytes, options)
        ranks.insert(_place(ranks, chosen), chosen)
    if card_bytes is not None:
        fitting = [rank for rank in ranks if rank.fits and rank.strategy != "zero0"]
        if not fitting:
            raise UserError(
                f"--gpu-memory {card_bytes / GIB:g}: {recipe.model} needs at least "
                f"{needed(min(rank.memory.peak_bytes for rank in ranks)) / GIB:.1f} GiB a card on {world_size} rank(s) "
                f"under every strategy; {_what_would_fit(recipe, config, world_size, card_bytes)}"
            )
        chosen = fitting[0]
    assert chosen is not None
    return Plan(recipe, origin, step, ranks, chosen)


def _place(ranks: list[RankPlan], own: RankPlan) -> int:
    """Where the recipe's own row stands among the strategies, which go from the cheapest to run to the dearest."""
    names = [rank.strategy for rank in ranks]
    return names.index("fsdp2") if own.strategy == "fsdp2_hybrid" else len(ranks)


def rank_plan(
    recipe: Recipe,
    config: Any,
    step: Step,
    strategy: str,
    world_size: int,
    card_bytes: float | None,
    options: dict[str, Any] | None = None,
) -> RankPlan:
    """options: as of `own_strategy`, of which `strategy` is the nearest of ours."""
    held = memory(step, strategy, world_size, options)
    fits = None if card_bytes is None else needed(held.peak_bytes) <= card_bytes
    name = strategy
    if options is not None:
        name = Path(recipe.engine.ds_config).stem
        if strategy == "fsdp2":
            name = f"fsdp2{'_hybrid' * bool(options['shard_size'])}{'_offload' * options['cpu_offload']}"
    done = work(recipe, config, step, strategy, world_size, shard_ranks(world_size, options))
    return RankPlan(world_size, name, held, done, fits)


def needed(peak_bytes: int) -> float:
    """The card that a peak of live bytes asks for."""
    return peak_bytes * FRAGMENTATION + CONTEXT_BYTES


def own_strategy(recipe: Recipe, world_size: int) -> tuple[str, dict[str, Any] | None]:
    """The strategy the recipe's engine section names, and what sets it apart from ours of that name: the
    zero_optimization section of a DeepSpeed file of the user's own, or fsdp2's shard_size and cpu_offload.

    One process is `single` whatever the recipe says, but for offloading.
    """
    name = recipe.engine.ds_config
    offload = recipe.engine.cpu_offload if recipe.engine.name == "fsdp2" else name == "zero3_offload"
    if world_size == 1 and not offload:
        return "single", None
    if recipe.engine.name == "fsdp2":
        shards = recipe.engine.shards(world_size)
        hybrid = shards if shards < world_size else None
        return "fsdp2", {"shard_size": hybrid, "cpu_offload": offload} if hybrid or offload else None
    zero = read_ds_config(recipe, world_size).get("zero_optimization", {})
    if name in STRATEGIES:
        return name, None
    stage = f"zero{zero.get('stage', 0)}"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        return "zero3_hpz", zero
    offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
    return (f"{stage}_offload" if offloaded else stage), zero


def _runnable(recipe: Recipe, world_size: int) -> list[str]:
    """The strategies an engine runs on so many ranks, with the recipe's fields; hpZ wants several whole nodes."""
    node = zero_options("zero3_hpz")["zero_hpz_partition_size"]
    nodes = world_size > node and world_size % node == 0
    names = _RUNNABLE if world_size > 1 else ("single", "zero3_offload")
    method = make_method(recipe)
    return [name for name in names if (name != "zero3_hpz" or nodes) and method.refusal(name) is None]


def compare_methods(recipe: Recipe) -> tuple[dict[str, Memory], dict[str, str]]:
    """({method: one process' memory at the peak on the recipe's model and batch}, {method left out: why}).

    The floor comes first: a frozen base, through which a backward pass runs.
    """
    config, _ = find_config(recipe.model)
    accumulating = recipe.micro_batches(1) > 1
    # Costs no memory, and masked tuning is refused with it.
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"weight_decay": 0.0})})
    # Which the others would refuse, having none.
    with_fp32_deltas = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"delta_dtype": "fp32"})})
    found = {Frozen.name: memory(record_step(recipe, config, accumulating, Frozen(recipe)), "single", 1)}
    left_out = {}
    for name in METHODS.names():
        try:
            method = make_method(recipe, name)
            if "delta_dtype" not in method.follows:
                method = make_method(with_fp32_deltas, name)
            method.check("single")
            found[name] = memory(record_step(recipe, config, accumulating, method), "single", 1)
        except UserError as error:  # of this model or task, such as a classifier alone where there is none
            left_out[name] = str(error)
    return found, left_out


def _what_would_fit(recipe: Recipe, config: Any, world_size: int, card_bytes: float) -> str:
    """The smallest change that fits: activation checkpointing, a micro batch of 1, more ranks; else a larger card."""
    saving = recipe.model_copy(deep=True)
    said = []
    smallest = float("inf")
    for field, value in (("activation_checkpointing", True), ("micro_batch_size", 1)):
        if getattr(saving.train, field) != value:
            setattr(saving.train, field, value)
            said.append(f"train.{field}={str(value).lower()}")
        step = record_step(saving, config, accumulating=True)
        ranks = world_size
        while ranks <= saving.train.global_batch_size:
            names = _runnable(saving, ranks)
            peaks = {name: needed(memory(step, name, ranks).peak_bytes) for name in names}
            fitting = [name for name in names if peaks[name] <= card_bytes]
            if fitting:
                count = f" on {ranks} ranks" if ranks > world_size else ""
                return f"{' '.join([*said, ''])}fits{count} with {fitting[0]}"
            smallest = min([smallest, *peaks.values()])
            ranks *= 2
    return f"a card of {smallest / GIB:.1f} GiB would do with {' '.join(said) or 'more ranks'}"
