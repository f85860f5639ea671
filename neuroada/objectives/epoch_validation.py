"""A classifier scored at the end of every epoch; the best epoch's is what a run saves.

The published protocol: the validation split is divided at random into a part that chooses the epoch (validation) and a
part that is reported (test).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.engines import Engine, evaluating
from neuroada.errors import UserError
from neuroada.files import check_schema, read_json, write_json
from neuroada.objectives.texts import Texts, encode_texts
from neuroada.objectives.validation import ends_epoch, known_up_to
from neuroada.tasks.data import load_examples
from neuroada.tasks.glue import score, split_validation
from neuroada.tasks.results_file import read_results
from neuroada.tasks.statistics import RULES, wilson
from neuroada.tasks.table import Task


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each text, squared error for a regression: [n] fp32, of logits [n, classes] fp32, labels [n]."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels, reduction="none")
    return F.cross_entropy(logits, labels.long(), reduction="none")


def predict(engine: Engine, texts: Texts, rows: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, losses), [n] fp32 each, on every rank; a prediction is the class with the highest logit, or the
    value of a regression. Collective.

    Texts are dealt over the ranks by length, `rows` to a batch.
    """
    order = np.argsort(texts.lengths, kind="stable")[::-1]
    each = math.ceil(len(order) / engine.world_size)
    # Every rank runs as many batches, since the others' forward passes may need it: a short one repeats the last text.
    mine = np.pad(order, (0, each * engine.world_size - len(order)), mode="edge")[engine.rank :: engine.world_size]
    own = len(order[engine.rank :: engine.world_size])
    found = torch.zeros(2, len(texts))
    with evaluating(engine.model):
        parts = []
        for start in range(0, each, rows):
            batch = texts.collate(mine[start : start + rows], pad_id).to(engine.device)
            logits = engine.model(**batch.inputs).logits.float()
            predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1).float()
            parts.append(torch.stack([predicted, losses(logits, batch.targets)]))
    found[:, mine[:own]] = torch.cat(parts, 1)[:, :own].cpu()
    predictions, of_each = engine.reduce(found.to(engine.device)).cpu().numpy()
    return predictions, of_each


class Epoch(BaseModel):
    """One epoch in validation.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Annotated[int, Field(ge=1)]
    epoch: float
    validation: float
    validation_loss: float
    test: float | None = None
    test_loss: float | None = None
    mismatched: float | None = None
    mismatched_loss: float | None = None


class Epochs(BaseModel):
    """validation.json."""

    epochs: list[Epoch]


def read_epochs(path: Path) -> list[dict[str, float]]:
    """UserError: not what `record` wrote."""
    found = check_schema(Epochs, read_json(path), str(path), "remove it and the checkpoints beside it")
    return [epoch.model_dump(exclude_none=True) for epoch in found.epochs]


class EpochValidation:
    """Scores the model at the end of every epoch, and knows which epoch is the best.

    `epochs`: {"step", "epoch", "validation", "validation_loss"} of each epoch, with "test" and "test_loss"
    where it was the best so far ("mismatched" and "mismatched_loss" too, of a task that has such a split): scores, and
    mean losses of a text. They are written to validation.json in the run's
    folder, from which a resumed run goes on.
    """

    def __init__(self, engine: Engine, recipe: Recipe, task: Task, tokenizer: Any, examples: int) -> None:
        """`examples`: of the training set, which make an epoch."""
        held_out = load_examples(task, "validation", recipe.data_dir)[: recipe.evaluate.limit]
        if len(held_out) < 2:
            raise UserError(
                f"task {task.name}: {len(held_out)} validation example cannot be divided in two; give it more"
            )
        self.engine, self.recipe, self.task, self.examples = engine, recipe, task, examples
        self.pad_id = tokenizer.pad_token_id
        self.validation, self.test = (
            encode_texts(part, task, tokenizer, recipe.train.max_length)
            for part in split_validation(held_out, recipe.train.seed)
        )
        self.mismatched: Texts | None = None
        if task.mismatched is not None:
            others = load_examples(task, task.mismatched, recipe.data_dir)[: recipe.evaluate.limit]
            self.mismatched = encode_texts(others, task, tokenizer, recipe.train.max_length)
        self.file = Path(recipe.output_dir) / "validation.json"
        self.epochs: list[dict[str, float]] = []

    def resume(self, first: int) -> None:
        self.epochs = known_up_to(first, self.file, read_epochs, self.engine)

    def due(self, step: int, steps: int) -> bool:
        batch = self.recipe.train.global_batch_size
        self.epoch = step * batch / self.examples
        return ends_epoch(step, steps, batch, self.examples)

    def improved(self, model: nn.Module, step: int) -> bool:
        """Score the validation part and, if this is the best so far, the test part. Collective."""
        best = max(map(_quality, self.epochs), default=(-math.inf, 0.0))
        entry = {"step": step, "epoch": round(self.epoch, 3)}
        entry["validation"], entry["validation_loss"] = self._score(self.validation)
        self.epochs.append(entry)
        if _quality(entry) <= best:
            return False
        entry |= self.reported()
        return True

    def measure(self, epoch: dict[str, float]) -> None:
        """Score a model that is already chosen, on every part, instead of by epochs. Collective.

        epoch: its "epoch" and "step".
        """
        score, loss = self._score(self.validation)
        self.epochs = [{**epoch, "validation": score, "validation_loss": loss, **self.reported()}]

    def reported(self) -> dict[str, float]:
        """Scores and losses of the parts that choose nothing. Collective."""
        found = {}
        found["test"], found["test_loss"] = self._score(self.test)
        if self.mismatched is not None:
            found["mismatched"], found["mismatched_loss"] = self._score(self.mismatched)
        return found

    def _score(self, texts: Texts) -> tuple[float, float]:
        """(score, mean loss)."""
        predictions, of_each = predict(self.engine, texts, 4 * self.recipe.train.micro_batch_size, self.pad_id)
        return score(self.task.metric, predictions.tolist(), texts.labels.tolist()), float(of_each.mean(dtype=float))

    def record(self) -> None:
        """Write validation.json, once the best epoch's adapter is saved."""
        if self.engine.rank == 0:
            write_json(self.file, {"epochs": self.epochs})

    def exhausted(self) -> bool:
        return False

    def finish(self, saved: Path) -> None:
        """Write results.json, of what the folder `saved` holds, and print it as a table."""
        if self.engine.rank == 0:
            results = self.results(saved)
            write_json(self.file.with_name("results.json"), results)
            Console(markup=False, emoji=False).print(table(results))

    def results(self, saved: Path) -> dict[str, Any]:
        """The best epoch's score, in the form of every results.json; `frozen_base` is the classifier's alone."""
        best = [entry for entry in self.epochs if "test" in entry][-1]
        entry = {
            **_entry(self.task, self.test, best["test"], best["test_loss"]),
            "frozen_base": None,
            "validation": {
                "n": len(self.validation),
                "score": best["validation"],
                "loss": best["validation_loss"],
                "epoch": best["epoch"],
                "step": best["step"],
            },
        }
        if self.mismatched is not None and "mismatched" in best:
            scored = _entry(self.task, self.mismatched, best["mismatched"], best["mismatched_loss"])
            entry["mismatched"] = scored
        other = self.file.parent / "frozen_base" / "results.json"
        if self.recipe.evaluate.frozen_base:
            entry["frozen_base"] = read_results(other).tasks[self.task.name].sound
        return {"model": self.recipe.model, "adapter": str(saved), "tasks": {self.task.name: entry}, "averages": {}}


def _entry(task: Task, texts: Texts, value: float, loss: float) -> dict[str, Any]:
    """What every entry of results.json has, of a score `value` on `texts`."""
    n = len(texts)
    return {
        "n": n,
        "published": value,
        "sound": value,
        "interval": dict.fromkeys(RULES, wilson(round(value * n), n)) if task.metric == "accuracy" else None,
        "unseen": None,
        "baseline": task.baseline([f"{label:g}" for label in texts.labels]),
        "metric": task.metric,
        "loss": loss,
    }


def _quality(entry: dict[str, float]) -> tuple[float, float]:
    """What is larger for a better epoch: its score, then, as small splits often tie, how low its loss is."""
    return entry["validation"], -entry["validation_loss"]


def table(results: Mapping[str, Any]) -> Table:
    """The score with its 95 % interval beside what it has to beat; below it the mismatched split's."""
    ((name, row),) = results["tasks"].items()
    view = Table(title=results["adapter"], caption=f"{row['metric']} x 100, with its 95 % interval for an accuracy")
    for column in ("task", "n", "score", "frozen base", "baseline", "epoch", "validation score"):
        view.add_column(column, justify="left" if column == "task" else "right")
    frozen = "" if row["frozen_base"] is None else f"{100 * row['frozen_base']:.1f}"
    chosen = row["validation"]
    view.add_row(*_cells(name, row, frozen), f"{chosen['epoch']:g}", f"{100 * chosen['score']:.1f}")
    if "mismatched" in row:
        view.add_row(*_cells(f"{name}, mismatched", row["mismatched"], ""), "", "")
    return view


def _cells(name: str, row: dict[str, Any], frozen: str) -> tuple[str, ...]:
    found = f"{100 * row['sound']:.1f}"
    if row["interval"] is not None:
        low, high = row["interval"]["sound"]
        found += f" ({100 * low:.1f}–{100 * high:.1f})"
    return name, f"{row['n']:,}", found, frozen, f"{100 * row['baseline']:.1f}"
