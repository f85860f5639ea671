"""A run, top to bottom: recipe -> data -> model -> adapter -> steps -> adapter folder."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from neuroada import sharding
from neuroada.config.recipe import Recipe
from neuroada.engines import Engine, base_parameters, make_engine
from neuroada.engines.collectives import together
from neuroada.engines.watchdog import Watchdog
from neuroada.environment import rank
from neuroada.errors import Preempted, UserError
from neuroada.files import FolderLock, explained
from neuroada.hf.loading import check_dtype, load_tokenizer
from neuroada.hf.model_folder import check_finite, sample_weights
from neuroada.methods import Method, make_method
from neuroada.objectives import Objective, Validation, make_objective
from neuroada.runs.metadata import write_metadata
from neuroada.training.banner import describe, describe_time
from neuroada.training.builder import RecipeModelBuilder
from neuroada.training.calibration import ExampleCalibration
from neuroada.training.checkpoint import (
    check_unscored,
    check_unused,
    find_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from neuroada.training.metrics import Metrics
from neuroada.training.preflight import check_ranks, check_space
from neuroada.training.sample_order import passes
from neuroada.training.schedule import lr_at
from neuroada.training.signals import StopRequest


def train(recipe: Recipe, stop: StopRequest | None = None) -> Path:
    """Run the recipe to its end; returns the folder of what was trained.

    `stop`: made earlier, to hear of signals from then on.

    Raises:
        UserError: the recipe, its data or its model do not fit; nothing has been written to output_dir by then.
        Preempted: a signal asked for an end; a checkpoint is saved.
    """
    if stop is None:
        with StopRequest() as stop:
            return train(recipe, stop)
    if (before := make_objective(recipe).before()) is not None:
        train(before, stop)
    return Trainer(recipe, stop).run()


class Trainer:
    """One run. Built by `load`, resumed by `resume`, run by `steps`; `run` does all three."""

    def __init__(self, recipe: Recipe, stop: StopRequest) -> None:
        self.recipe, self.stop = recipe, stop
        self.folder = Path(recipe.output_dir)
        self.lock = FolderLock(self.folder, field="output_dir = ")
        self.watchdog = Watchdog(recipe.train.step_timeout_minutes, rank())
        self.watchdog.watch("joining the other ranks")
        self.engine: Engine = make_engine(recipe)
        self.method: Method = make_method(recipe)
        self.objective: Objective = make_objective(recipe)

    def run(self) -> Path:
        try:
            return self._run()
        finally:
            self.watchdog.watch(None)
            self.lock.release()

    def _run(self) -> Path:
        self.watchdog.watch("the start")
        self.load()
        first = self.resume()
        steps = total_steps(self.recipe, len(self.objective.data))
        if first > steps:
            raise UserError(
                f"train.epochs, train.max_steps: {steps} steps are asked for, and {self.folder} holds a run of "
                f"{first}; ask for at least as many, or choose another output_dir"
            )
        describe(self.recipe, self.engine, self.method, self.model, self.objective.data, steps, first)
        if self.stop.agreed(self.engine):
            raise Preempted(f"stopped before step {first + 1} of {steps}; run the same command to go on")
        with self._record(steps, first) as metrics:
            self.steps(range(first, steps), metrics)
        self.watchdog.watch("writing the result")
        saved = self.folder / self.method.folder
        if self.validation is None:
            self.save()
        else:
            self.validation.finish(saved)
        self.engine.reduce(torch.zeros(1, device=self.engine.device))  # no rank leaves before the result is written
        self.watchdog.watch(None)
        return saved

    def load(self) -> None:
        """Data, model and optimizer, with every rank's errors told before a step is taken. Collective."""
        recipe, engine = self.recipe, self.engine
        with together(engine):
            micro_batches = recipe.micro_batches(engine.world_size)
            self.method.check(engine.strategy)
            self.objective.check()
            if engine.rank == 0:  # for all ranks
                self.lock.acquire()
            check_unused(recipe)
            compute = check_dtype(recipe.train.dtype, engine.device)
            self.objective.load_data(load_tokenizer(recipe.model))
            self.calibration = ExampleCalibration(recipe, self.objective)
            self.validation: Validation | None = self.objective.validation(engine)
        check_ranks(engine, recipe, self.objective.data_fingerprint)
        torch.manual_seed(recipe.train.seed)
        with together(engine):
            builder = RecipeModelBuilder(recipe, self.method, self.objective, compute)
            self.model = engine.load(builder)
            # What the files lack, as a new classifier, has junk in its memory until `start` sets it.
            named = ((name, param) for name, param in self.model.named_parameters() if builder.checkpoint_has(name))
            check_finite(((name, sharding.elements(param)) for name, param in named), f"model = {recipe.model}")
        self.method.prepare(self.model, engine.device, compute)
        self.objective.start(self.model)
        if recipe.train.activation_checkpointing:
            # Not reentrant: the frozen embedding's output needs no gradient then.
            cast(Any, self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        engine.start(self.model, micro_batches)
        self.method.choose(engine, self.model, self.calibration.on(engine, self.model, self._before_selection_pass))
        self.watchdog.watch("the start")

    def _before_selection_pass(self, number: int, passes: int, done: float) -> None:
        """Choosing connections by a whole training set takes as long as training on it: each pass is as a step.

        Ranks share the passes. Rank 0 tells the time left after three of its own, and anew whenever it has taken four
        times as long: a short pass takes longer than its tokens' share.
        """
        self.watchdog.watch(f"pass {number + 1} of {passes} of the selection")
        if self.stop.agreed(self.engine):
            raise Preempted(
                f"stopped before pass {number + 1} of {passes} of the selection; run the same command again"
            )
        if self.engine.rank != 0:
            return
        now = time.perf_counter()
        if number == 0:
            self.selecting_since, self.told_after = now, 0.0
        took = now - self.selecting_since
        if number >= 3 * self.engine.world_size and took >= 4 * self.told_after:
            describe_time(took / done * (1 - done), passes - number, "passes of the selection")
            self.told_after = took

    def resume(self) -> int:
        """Take up the newest checkpoint, if there is one; returns the steps that are done. Collective."""
        self.identity: dict[str, Any] = {
            **self.recipe.identity(),
            "data": self.objective.data_fingerprint,
            "base": self.method.base_fingerprint(self.model),
            "weights": sample_weights(Path(self.recipe.model)),
        }
        first = 0
        checkpoint = find_checkpoint(self.folder) if self.recipe.checkpoint.resume == "auto" else None
        if checkpoint:
            first = restore_checkpoint(
                checkpoint, self.engine, self.model, self.identity, partial(self.run_micro_batches)
            )
        else:
            with together(self.engine):
                check_unscored(self.folder)
        if self.validation is not None:
            self.validation.resume(first)
        check_space(self.engine, self.recipe, self.model)
        return first

    def steps(self, remaining: range, metrics: Metrics | None) -> None:
        """The loop: train the steps `remaining` (from 0), with validation and checkpoints."""
        recipe, engine, steps = self.recipe, self.engine, remaining.stop
        for step in remaining:
            if self.validation is not None and self.validation.exhausted():
                break
            self.watchdog.watch(f"step {step + 1}")
            started = time.perf_counter()
            loss, tokens = self.run_micro_batches(step)
            lr = lr_at(step, steps, recipe.optimizer)
            norm = engine.step(lr)
            done = step + 1
            self._check_finite(done, loss, norm)
            if metrics is not None:
                metrics.log(done, loss, lr, norm, tokens, time.perf_counter() - started)
                if done == remaining.start + 3:  # the first ones also compile and allocate
                    describe_time((time.perf_counter() - started) * (steps - done), steps - done, "steps")
            # Before the checkpoint, so that a run that resumes there has it behind itself.
            if self.validation is not None and self.validation.due(done, steps):
                self.watchdog.watch(f"the validation after step {done}")
                if self.validation.improved(self.model, done):
                    self.save()
                self.validation.record()
            stopping = self.stop.agreed(engine)
            last = done == steps or (self.validation is not None and self.validation.exhausted())
            if stopping or last or done % recipe.checkpoint.every_steps == 0:
                save_checkpoint(engine, self.model, recipe, done, self.identity)
            if stopping and done < steps:
                raise Preempted(f"stopped at step {done} of {steps}, checkpoint saved; run the same command to go on")

    def run_micro_batches(self, step: int) -> tuple[float, int]:
        """Forward and backward of this rank's share of a step's global batch; (loss, real tokens) of all of it."""
        recipe, engine, objective = self.recipe, self.engine, self.objective
        lengths = objective.data.lengths
        batch = objective.batch(step, recipe.train.global_batch_size)
        loss = torch.zeros((), device=engine.device)
        # Dropout, where a model has any: from seed, step and rank alone, so that a resumed run draws the same.
        torch.manual_seed(hash((recipe.train.seed, step, engine.rank)) & 0x7FFF_FFFF)
        for chosen, of, weight in passes(recipe, batch, lengths, engine.rank, engine.world_size):
            part = objective.loss(engine.model, chosen, of, engine.device) * weight
            engine.backward(part)
            loss += part.detach()
        return engine.reduce(loss).item(), int(lengths[batch].sum())

    def save(self) -> None:
        """Write what was trained, with the tokenizer. Collective; rank 0 writes."""
        saved = self.folder / self.method.folder
        self.method.save(self.model, saved)
        if self.engine.rank == 0:
            with explained(saved):
                self.objective.tokenizer.save_pretrained(saved)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            last = find_checkpoint(self.folder) or "none"
            raise UserError(
                f"step {step}: loss is {loss}, gradient norm {norm}; stopped. Lower optimizer.lr "
                f"({self.recipe.optimizer.lr}) or check the data; last good checkpoint: {last}"
            )

    @contextmanager
    def _record(self, steps: int, first: int) -> Iterator[Metrics | None]:
        """Rank 0's files of the run: its recipe, its metadata and its metrics."""
        if self.engine.rank != 0:
            yield None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe.save(self.folder / "recipe.yaml")
        write_metadata(
            self.folder,
            method=self.method.describe(),
            objective=self.objective.name,
            loss_unit=self.objective.loss_unit,
            trainable=self.method.trainable(self.model),
            parameters=base_parameters(self.model),
            steps=steps,
            strategy=self.engine.strategy,
            world_size=self.engine.world_size,
        )
        self.objective.write_data(self.folder)
        metrics = Metrics(self.recipe, steps, first)
        try:
            yield metrics
        finally:
            metrics.close()


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the run: whole global batches until every epoch is through, or train.max_steps."""
    steps = math.ceil(recipe.train.epochs * examples / recipe.train.global_batch_size)
    return min(steps, recipe.train.max_steps or steps)
