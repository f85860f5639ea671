"""What is compared: a method with its fields, and the learning rates it may try."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuroada.comparison.summary import folder_of
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.errors import UserError

EXAMPLE = "such as neuroada:k=20 or full@1e-5,3e-5"


@dataclass(frozen=True)
class Comparison:
    """What every run of a comparison shares.

    `held_out`: questions of the validation set, and of the test set. `general_text`: a file that is scored before and
    after training.
    """

    recipe: str
    overrides: tuple[str, ...]
    held_out: int
    out: Path
    general_text: str | None = None


@dataclass(frozen=True)
class Contender:
    label: str  # as given, without its rates
    overrides: tuple[str, ...]
    lrs: tuple[float, ...]

    def sized(self, fields: dict[str, Any]) -> "Contender":
        """With these fields of the adapter section, in its label too. UserError where it sets one of them itself."""
        name, _, given = self.label.partition(":")
        own = {field.partition("=")[0] for field in given.split(",")}
        if clash := sorted(own & fields.keys()):
            raise UserError(f"--match: {self.label} sets {clash[0]} itself; leave that out, or leave out --match")
        set_here = [f"{field}={value}" for field, value in fields.items()]
        label = f"{name}:{','.join([*filter(None, [given]), *set_here])}" if fields else self.label
        return replace(self, label=label, overrides=(*self.overrides, *(f"adapter.{field}" for field in set_here)))

    def recipe(self, comparison: Comparison, lr: float, seed: int) -> Recipe:
        folder = comparison.out / "runs" / folder_of(self.label) / f"lr-{lr:g}-seed-{seed}"
        return load_recipe(
            comparison.recipe,
            [
                *comparison.overrides,
                *self.overrides,
                f"optimizer.lr={lr!r}",
                f"train.seed={seed}",
                f"train.held_out={comparison.held_out}",
                f"output_dir={folder}",
            ],
        )


def numbers(field: str, text: str, kind: type) -> list[Any]:
    """Numbers with commas between them. UserError for anything else."""
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{field} = {text}: must be numbers with commas between them") from None


def read_contenders(specs: list[str], default_lrs: str) -> list[Contender]:
    """Each of name[:field=value,...][@rate,...]. UserError unless all have as many rates: that would favour one."""
    default = numbers("--lrs", default_lrs, float)
    contenders = []
    for spec in specs:
        label, _, own = spec.partition("@")
        name, _, fields = label.partition(":")
        lrs = numbers(f"--methods {spec}", own, float) or default
        if not lrs:
            raise UserError(f"--methods {spec}: has no learning rate; give --lrs, or {spec}@1e-3,3e-3")
        overrides = [f"adapter.method={name}", *(f"adapter.{field}" for field in fields.split(",") if field)]
        contenders.append(Contender(label, tuple(overrides), tuple(lrs)))
    counts = {contender.label: len(contender.lrs) for contender in contenders}
    if len(counts) < len(contenders):
        raise UserError(f"--methods {' '.join(specs)}: names a method twice; leave one out")
    if len(set(counts.values())) > 1:
        raise UserError(f"--methods: every method must have as many learning rates to try; here {counts}")
    return contenders
