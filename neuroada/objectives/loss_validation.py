"""The loss on held-out examples as the model trains: the best state is what a run saves, and its end may come early."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.data import TokenData
from neuroada.engines import Engine, evaluating
from neuroada.files import write_json
from neuroada.objectives.sampling import answer, prompts_of
from neuroada.objectives.validation import ends_epoch, known_up_to
from neuroada.tasks.validation_file import read_measured

if TYPE_CHECKING:
    from neuroada.objectives.own_data import OwnData


class LossValidation:
    """Measures the loss every evaluate.every_steps, or at the end of every epoch, and at the end of the run.

    `measured`: {"step", "loss", "samples"} of each time, samples as {"prompt", "expected", "answer"}; step 0 is the
    model before training. They are written to validation.json in the run's folder, from which a resumed run goes on.
    """

    def __init__(self, engine: Engine, recipe: Recipe, objective: OwnData, data: TokenData, examples: int) -> None:
        """`examples`: of the training set, which make an epoch."""
        self.engine, self.recipe, self.objective, self.data, self.examples = engine, recipe, objective, data, examples
        self.file = Path(recipe.output_dir) / "validation.json"
        self.measured: list[dict[str, Any]] = []

    def resume(self, first: int) -> None:
        self.measured = known_up_to(first, self.file, read_measured, self.engine)
        if first == 0:
            with evaluating(self.engine.model):
                self.measured = [{"step": 0, "loss": self._loss(), "samples": []}]
            if self.engine.rank == 0:
                print(f"validation loss before training: {self.measured[0]['loss']:.4f}", flush=True)

    def due(self, step: int, steps: int) -> bool:
        every = self.recipe.evaluate.every_steps
        if every is not None:
            return step == steps or step % every == 0
        return ends_epoch(step, steps, self.recipe.train.global_batch_size, self.examples)

    def improved(self, model: nn.Module, step: int) -> bool:
        best = min((entry["loss"] for entry in self._trained()), default=math.inf)
        with evaluating(self.engine.model):
            loss, samples = self._loss(), self._samples()
        self.measured.append({"step": step, "loss": loss, "samples": samples})
        if self.engine.rank == 0:
            print(f"\nstep {step}: validation loss {loss:.4f}" + (", the best so far" if loss < best else ""))
            for sample in samples:
                print(f"  {_line(sample['prompt'], 60)} -> {_line(sample['answer'])} | {_line(sample['expected'])}")
        return loss < best

    def record(self) -> None:
        if self.engine.rank == 0:
            write_json(self.file, {"measured": self.measured})

    def exhausted(self) -> bool:
        patience = self.recipe.evaluate.early_stopping_patience
        losses = [entry["loss"] for entry in self._trained()]
        return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def finish(self, saved: Path) -> None:
        if self.engine.rank == 0:
            best = min(self._trained(), key=lambda entry: entry["loss"])
            before = f", from {self.measured[0]['loss']:.4f} before training" if self.measured[0]["step"] == 0 else ""
            print(f"best validation loss {best['loss']:.4f} at step {best['step']}{before}: saved in {saved}")

    def _trained(self) -> list[dict[str, Any]]:
        return [entry for entry in self.measured if entry["step"] > 0]

    def _loss(self) -> float:
        """Over all held-out items. Collective; every rank runs as many forward passes."""
        engine, rows = self.engine, self.recipe.train.micro_batch_size
        order = np.argsort(self.data.lengths, kind="stable")[::-1]
        each = math.ceil(len(order) / (engine.world_size * rows)) * rows
        # A rank with fewer items repeats the last ones, and leaves them out of the sum.
        padded = np.pad(order, (0, each * engine.world_size - len(order)), mode="edge")
        mine = padded[engine.rank :: engine.world_size]
        own = len(order[engine.rank :: engine.world_size])
        total: torch.Tensor | None = None
        for start in range(0, each, rows):
            chosen = mine[start : min(start + rows, own)]
            counts = len(chosen) > 0
            batch = chosen if counts else mine[start : start + 1]
            sums = self.objective.held_out_parts(engine.model, self.data, batch, engine.device) * counts
            total = sums if total is None else total + sums
        assert total is not None
        return self.objective.held_out_loss(engine.reduce(total.float()), self.data)

    def _samples(self) -> list[dict[str, str]]:
        count = min(self.recipe.evaluate.samples, len(self.data))
        if not count:
            return []
        tokenizer = self.objective.tokenizer
        prompts, expected = prompts_of([self.data.sequences(item)[0] for item in range(count)])
        model: Callable[..., Any] = self.engine.model
        answers = answer(model, prompts, tokenizer, self.engine.device)
        decode = tokenizer.decode
        return [
            {"prompt": decode(p), "expected": decode(e), "answer": decode(a)}
            for p, e, a in zip(prompts, expected, answers, strict=True)
        ]


def _line(text: str, length: int = 90) -> str:
    """The end of a prompt, the beginning of an answer: in one line."""
    said = " ".join(text.split())
    return said if len(said) <= length else f"{said[: length - 3]}..."
