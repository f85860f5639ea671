"""A plan as text."""

from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.methods import make_method
from neuroada.planning.plan import Plan, RankPlan
from neuroada.planning.strategies import Memory
from neuroada.registry import METHODS
from neuroada.runs.formatting import format_bytes
from neuroada.tasks.data import load_examples
from neuroada.tasks.table import get_task
from neuroada.training.trainer import total_steps

_KINDS = (
    *("weights", "idx", "delta", "classifier", "mask"),
    *("gradients", "optimizer", "activations", "temporary", "buckets", "gathered"),
)


def plan(plan: Plan, card_gib: float | None = None, tokens_per_second: float | None = None) -> str:
    """The plan: what trains, a table of the strategies in GB (1e9 bytes), and the work of a step."""
    recipe, chosen = plan.recipe, plan.chosen
    lines = [
        f"model      {recipe.model} ({plan.config_origin}), {recipe.train.dtype}",
        f"trainable  {plan.trainable:,} of {plan.parameters:,} ({100 * plan.trainable / plan.parameters:.4f} %); "
        f"a checkpoint is {format_bytes(plan.checkpoint_bytes)}",
        f"rank       {recipe.train.micro_batch_size} x {recipe.train.max_length} tokens at once, at most"
        + (", activation checkpointing" if recipe.train.activation_checkpointing else "")
        + (", packed" if recipe.train.packed else ""),
        "",
        *_table([_row(rank, card_gib) for rank in plan.ranks], chosen.strategy),
        "",
        f"{'recommended' if card_gib else 'planned':10} {chosen.strategy} on {chosen.world_size} rank(s): "
        f"{format_bytes(chosen.memory.peak_bytes)} a rank"
        + (f", {format_bytes(chosen.memory.host_bytes)} of host memory a rank" if chosen.memory.host_bytes else ""),
        f"step       {recipe.train.global_batch_size} sequences, at most {chosen.work.tokens:,} tokens, "
        f"{chosen.work.flops / 1e12:,.1f} TFLOP over all ranks",
        f"sent       {format_bytes(chosen.work.sent_bytes)} a rank and step, "
        f"{100 * chosen.work.adapter_share:.1f} % of it idx, delta and gradients",
        f"run        {run_length(recipe)}",
    ]
    if tokens_per_second and (steps := steps_of(recipe)):
        lines.append(
            f"time       at most {steps * chosen.work.tokens / tokens_per_second / 3600:.1f} hours at "
            f"{tokens_per_second:,.0f} tokens/s"
        )
    return "\n".join(lines)


def comparison(recipe: Recipe, methods: dict[str, Memory], left_out: dict[str, str]) -> str:
    """The methods' peaks side by side, in GB (1e9 bytes)."""
    own = methods[recipe.adapter.method].peak_bytes if recipe.adapter.method in methods else 0
    rows = [
        {
            "method": name,
            "peak": f"{held.peak_bytes / 1e9:.2f}",
            recipe.adapter.method: f"{100 * (own / held.peak_bytes - 1):+.0f} %",
            **_kinds(held),
        }
        for name, held in methods.items()
    ]
    told = {name: make_method(recipe, name).describe() for name in methods if name in METHODS}
    head = (
        f"{recipe.model}, {recipe.train.micro_batch_size} x {recipe.train.max_length} tokens, {recipe.train.dtype}, "
        f"activation checkpointing {'on' if recipe.train.activation_checkpointing else 'off'}; GB of one process at "
        f"the peak of a step\n{'; '.join(dict.fromkeys(told.values()))}"
    )
    return "\n".join([head, "", *_table(rows), *(f"left out: {why}" for why in left_out.values())])


def steps_of(recipe: Recipe) -> int | None:
    """Optimizer steps of the run; None where the data is not here and no train.max_steps is set.

    Counted on all examples: those whose prompt alone fills max_length are dropped when the run tokenises them.
    """
    if recipe.task is None:  # how many examples there are is known once they are tokenised
        return recipe.train.max_steps
    try:
        return total_steps(recipe, len(load_examples(get_task(recipe.task), "train", recipe.data_dir)))
    except UserError:
        return recipe.train.max_steps


def run_length(recipe: Recipe) -> str:
    steps = steps_of(recipe)
    if steps is None:
        when = f"the data is at {recipe.data_dir}" if recipe.task else "the data are tokenised"
        return f"{recipe.train.epochs:g} epochs; steps are known once {when}"
    return f"{steps:,} steps, {steps * recipe.train.global_batch_size:,} sequences"


def _row(rank: RankPlan, card_gib: float | None) -> dict[str, str]:
    fits = {} if card_gib is None else {"fits": "yes" if rank.fits else "no"}
    row = {"strategy": rank.strategy, "peak": f"{rank.memory.peak_bytes / 1e9:.2f}"} | fits | _kinds(rank.memory)
    return row | {"host": f"{rank.memory.host_bytes / 1e9:.2f}", "sent": f"{rank.work.sent_bytes / 1e9:.2f}"}


def _kinds(held: Memory) -> dict[str, str]:
    return {kind: f"{held.by_kind.get(kind, 0) / 1e9:.2f}" for kind in _KINDS}


def _table(rows: list[dict[str, str]], chosen: str = "") -> list[str]:
    """Columns that are zero in every row are left out; the chosen row is marked."""
    names = [name for name in rows[0] if any(row[name] != "0.00" for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}

    def line(row: dict[str, str], mark: str) -> str:
        first, *rest = names
        return f"{mark} {row[first]:{widths[first]}}  " + "  ".join(f"{row[name]:>{widths[name]}}" for name in rest)

    marks = ["*" if chosen and rows[0].keys() and next(iter(row.values())) == chosen else " " for row in rows]
    return [line({name: name for name in names}, " "), *map(line, rows, marks)]
