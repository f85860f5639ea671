"""GLUE with an encoder: texts to labels instead of prompts to answers; the rest of a run is the same.

The published protocol: the validation split is cut at random into a part that chooses and a part that is reported. The
adapter of the epoch that scores best on the first is kept, and its score on the second is the result.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from neuroada.errors import UserError
from neuroada.evaluation.results import RULES, to_json, wilson, write_atomically
from neuroada.tasks.data import load_examples
from neuroada.tasks.glue import score, split_validation
from neuroada.tasks.table import Example, Task
from neuroada.training.engines import Engine, evaluating
from neuroada.training.preflight import gather
from neuroada.training.recipe import Recipe

_CHUNK = 4096  # texts given to the tokenizer at once


@dataclass(frozen=True)
class Texts:
    """Texts (or pairs) and their labels, the tokens of all of them one after the other in flat arrays.

    Text i is `features[name][offsets[i] : offsets[i + 1]]`: input_ids, and token_type_ids where the model reads them.
    """

    features: dict[str, np.ndarray]  # [tokens] int32 each
    offsets: np.ndarray  # [n + 1] int64
    labels: np.ndarray  # [n] fp32: a class number, or the value of a regression
    full: int  # texts that fill max_length: longer ones were cut at their end

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: tokens of each text."""
        return np.diff(self.offsets)

    def __str__(self) -> str:
        cut = f"; {self.full:,} of max_length, longer texts cut there" if self.full else ""
        return f"{len(self):,} texts, {self.offsets[-1]:,} tokens{cut}"

    def collate(self, chosen: np.ndarray, pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The model's inputs, [len(chosen), longest] int64 each, padded on the right."""
        inputs = {}
        for name, flat in self.features.items():
            rows = [torch.from_numpy(flat[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)) for i in chosen]
            pad = pad_id if name == "input_ids" else 0
            inputs[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
        lengths = torch.from_numpy(self.lengths[chosen])
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)
        return inputs


def encode_texts(examples: list[Example], task: Task, tokenizer: Any, max_length: int) -> Texts:
    """Tokenise the task's text columns, at most `max_length` tokens each; of a pair the longer text is cut first."""
    max_length = min(max_length, tokenizer.model_max_length)
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    pieces: dict[str, list[list[int]]] = {name: [] for name in names}
    for start in range(0, len(examples), _CHUNK):
        columns = [[example[column] for example in examples[start : start + _CHUNK]] for column in task.text_columns]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        for name in names:
            pieces[name] += encoded[name]
    lengths = np.array([len(ids) for ids in pieces["input_ids"]])
    return Texts(
        features={name: np.concatenate(some).astype(np.int32) for name, some in pieces.items()},
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array([float(example[task.answer_column]) for example in examples], dtype=np.float32),
        full=int((lengths == max_length).sum()),
    )


def text_loss(model: nn.Module, inputs: dict[str, torch.Tensor], labels: np.ndarray, examples: int) -> torch.Tensor:
    """Cross-entropy (squared error for a regression) summed over these texts, over the `examples` of the global batch.

    So the parts of all ranks and micro batches add up to the mean over the global batch, however it is divided.
    """
    return _losses(model(**inputs).logits.float(), labels).sum() / examples


def _losses(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """[n] fp32, of logits [n, classes] fp32 and labels [n]."""
    gold = torch.from_numpy(labels).to(logits.device)
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], gold, reduction="none")
    return F.cross_entropy(logits, gold.long(), reduction="none")


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
            batch = mine[start : start + rows]
            logits = engine.model(**texts.collate(batch, pad_id, engine.device)).logits.float()
            predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1).float()
            parts.append(torch.stack([predicted, _losses(logits, texts.labels[batch])]))
    found[:, mine[:own]] = torch.cat(parts, 1)[:, :own].cpu()
    predictions, losses = engine.reduce(found.to(engine.device)).cpu().numpy()
    return predictions, losses


def frozen_base(recipe: Recipe) -> Recipe:
    """The run to compare with: the same, but only the classifier trains, over the encoder as it is."""
    return recipe.model_copy(
        update={
            "adapter": recipe.adapter.model_copy(update={"method": "head"}),
            "evaluate": recipe.evaluate.model_copy(update={"frozen_base": False}),
            "output_dir": str(Path(recipe.output_dir) / "frozen_base"),
        }
    )


class Validation:
    """Scores the model at the end of every epoch, and knows which epoch is the best.

    `epochs`: {"step", "epoch", "choose", "choose_loss"} of each epoch, with "report" and "report_loss" where it was the
    best so far: scores, and mean losses of a text. They are kept in validation.json of the run's folder, from which a
    resumed run goes on.
    """

    def __init__(self, engine: Engine, recipe: Recipe, task: Task, tokenizer: Any) -> None:
        if recipe.train.packing:
            raise UserError("train.packing = true: an encoder reads one text, or pair, a row; set it to false")
        if other := [name for name in recipe.evaluate.tasks if name != task.name]:
            raise UserError(f"evaluate.tasks: a classifier of {task.name} cannot be scored on {', '.join(other)}")
        examples = load_examples(task, "validation", recipe.data_dir)[: recipe.evaluate.limit]
        if len(examples) < 2:
            raise UserError(f"task {task.name}: {len(examples)} validation example cannot be cut in two; give it more")
        self.engine, self.recipe, self.task = engine, recipe, task
        self.pad_id = tokenizer.pad_token_id
        self.choose, self.report = (
            encode_texts(part, task, tokenizer, recipe.train.max_length)
            for part in split_validation(examples, recipe.train.seed)
        )
        self.file = Path(recipe.output_dir) / "validation.json"
        self.epochs: list[dict[str, float]] = []

    def resume(self, first: int) -> None:
        """Take up what was found in this folder up to step `first`. Collective."""
        found = json.loads(self.file.read_text()) if self.engine.rank == 0 and self.file.is_file() else {"epochs": []}
        self.epochs = [entry for entry in gather(self.engine, found)[0]["epochs"] if entry["step"] <= first]

    def due(self, step: int, steps: int, examples: int) -> bool:
        """Whether an epoch, or the run, ends with step `step` (from 1) of `steps`."""
        batch = self.recipe.train.global_batch_size
        self.epoch = step * batch / examples
        return step == steps or step * batch // examples > (step - 1) * batch // examples

    def improved(self, step: int) -> bool:
        """Score the part that chooses and, if this is the best so far, the part that is reported. Collective."""
        best = max(map(_quality, self.epochs), default=(-math.inf, 0.0))
        entry = {"step": step, "epoch": round(self.epoch, 3)}
        entry["choose"], entry["choose_loss"] = self._score(self.choose)
        self.epochs.append(entry)
        if _quality(entry) <= best:
            return False
        entry["report"], entry["report_loss"] = self._score(self.report)
        return True

    def _score(self, texts: Texts) -> tuple[float, float]:
        """(score, mean loss)."""
        predictions, losses = predict(self.engine, texts, 4 * self.recipe.train.micro_batch_size, self.pad_id)
        return score(self.task.metric, predictions.tolist(), texts.labels.tolist()), float(losses.mean(dtype=float))

    def record(self) -> None:
        """Write validation.json, once the best epoch's adapter is saved."""
        if self.engine.rank == 0:
            write_atomically(self.file, to_json({"epochs": self.epochs}))

    def finish(self) -> None:
        """Write results.json and print it as a table."""
        if self.engine.rank == 0:
            results = self.results()
            write_atomically(self.file.with_name("results.json"), to_json(results))
            Console().print(_table(results))

    def results(self) -> dict[str, Any]:
        """The best epoch's score, in the form of every results.json; `frozen_base` is the classifier's alone."""
        best = [entry for entry in self.epochs if "report" in entry][-1]
        n, value = len(self.report), best["report"]
        golds = [f"{label:g}" for label in self.report.labels]
        entry = {
            "n": n,
            "published": value,
            "sound": value,
            "interval": dict.fromkeys(RULES, wilson(round(value * n), n)) if self.task.metric == "accuracy" else None,
            "unseen": None,
            "baseline": self.task.baseline(golds),
            "frozen_base": None,
            "metric": self.task.metric,
            "loss": best["report_loss"],
            "choose": {
                "n": len(self.choose),
                "score": best["choose"],
                "loss": best["choose_loss"],
                "epoch": best["epoch"],
                "step": best["step"],
            },
        }
        other = self.file.parent / "frozen_base" / "results.json"
        if self.recipe.evaluate.frozen_base:
            entry["frozen_base"] = json.loads(other.read_text())["tasks"][self.task.name]["sound"]
        adapter = str(self.file.parent / "adapter")
        return {"model": self.recipe.model, "adapter": adapter, "tasks": {self.task.name: entry}, "averages": {}}


def _quality(entry: dict[str, float]) -> tuple[float, float]:
    """What is larger for a better epoch: its score, then, as small splits often tie, how low its loss is."""
    return entry["choose"], -entry["choose_loss"]


def _table(results: dict[str, Any]) -> Table:
    """One row: the score with its 95 % interval beside what it has to beat."""
    ((name, row),) = results["tasks"].items()
    view = Table(title=results["adapter"], caption=f"{row['metric']} x 100, with its 95 % interval for an accuracy")
    for column in ("task", "n", "score", "frozen base", "baseline", "epoch", "choosing score"):
        view.add_column(column, justify="left" if column == "task" else "right")
    found = f"{100 * row['sound']:.1f}"
    if row["interval"] is not None:
        low, high = row["interval"]["sound"]
        found += f" ({100 * low:.1f}–{100 * high:.1f})"
    frozen = "" if row["frozen_base"] is None else f"{100 * row['frozen_base']:.1f}"
    chosen = row["choose"]
    cells = (frozen, f"{100 * row['baseline']:.1f}", f"{chosen['epoch']:g}", f"{100 * chosen['score']:.1f}")
    view.add_row(name, f"{row['n']:,}", found, *cells)
    return view
