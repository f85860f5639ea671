"""A run, top to bottom: recipe -> data -> model -> adapter -> steps -> adapter folder."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from neuroada.adapter import NeuroAdaLinear
from neuroada.adapter.fingerprint import fingerprint as adapter_fingerprint
from neuroada.errors import Preempted, UserError
from neuroada.reporting import write_facts, write_report
from neuroada.tasks.data import fingerprint, load_examples
from neuroada.tasks.encode import Encoded, encode
from neuroada.tasks.table import get_task
from neuroada.training.batches import collate, global_batch, share
from neuroada.training.checkpoint import check_unused, find_checkpoint, restore_checkpoint, save_checkpoint
from neuroada.training.classification import Texts, Validation, encode_texts, frozen_base, text_loss
from neuroada.training.classifier import start_classifier
from neuroada.training.connections import CALIBRATION, choose_connections
from neuroada.training.engines import Engine, base_numel, make_engine
from neuroada.training.held_out import hold_out
from neuroada.training.loss import answer_loss
from neuroada.training.methods import check_method, load_model, save_trained, strategy, trainable, trained_folder
from neuroada.training.metrics import Metrics
from neuroada.training.model import check_dtype, load_tokenizer
from neuroada.training.preemption import StopRequest
from neuroada.training.preflight import check_ranks, check_space, code_version, describe, describe_time, together
from neuroada.training.recipe import Recipe
from neuroada.training.schedule import lr_at
from neuroada.training.watchdog import Watchdog


@dataclass(frozen=True)
class Material:
    """What a run learns from: the same on every rank."""

    data: Encoded | Texts
    tokenizer: Any
    validation: Validation | None
    """Of a classification task."""
    fingerprint: str
    """Of the examples."""


def train(recipe: Recipe, stop: StopRequest | None = None) -> Path:
    """Run the recipe to its end; returns the folder of what was trained.

    `stop`: made earlier, to hear of signals from then on.

    Raises:
        UserError: the recipe, its data or its model do not fit; nothing has been written to output_dir by then.
        Preempted: a signal asked for an end; a checkpoint is saved.
    """
    stop = stop or StopRequest()
    if recipe.evaluate.frozen_base:
        train(frozen_base(recipe), stop)
    engine = make_engine(recipe)
    watchdog = Watchdog(recipe.train.step_timeout_minutes, engine.rank)
    watchdog.watch("the start")
    with together(engine):
        micro_batches = recipe.micro_batches(engine.world_size)
        check_method(recipe, engine)
        check_unused(recipe)
        dtype = check_dtype(recipe, engine.device)
        material = prepare(engine, recipe)
    check_ranks(engine, recipe, material.fingerprint)
    torch.manual_seed(recipe.train.seed)
    with together(engine):
        model = load_model(engine, recipe, dtype)
    if material.validation is not None:
        start_classifier(model, recipe.train.seed)
    if recipe.train.activation_checkpointing:
        # Not reentrant: the frozen embedding's output needs no gradient then.
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    engine.start(model, micro_batches)
    choose_later(engine, model, recipe, material)

    identity = {**recipe.identity(), "data": material.fingerprint, "base": base_fingerprint(model)}
    checkpoint = find_checkpoint(Path(recipe.output_dir)) if recipe.checkpoint.resume == "auto" else None
    first = 0
    if checkpoint:
        first = restore_checkpoint(checkpoint, engine, identity, partial(run_micro_batches, engine, recipe, material))
    if material.validation is not None:
        material.validation.resume(first)
    check_space(engine, recipe, model)
    steps = total_steps(recipe, len(material.data))
    describe(recipe, engine, model, material.data, steps, first)
    if stop.agreed(engine):
        raise Preempted(f"stopped before step {first + 1} of {steps}; run the same command to go on")
    with record(engine, recipe, model, steps, first) as metrics:
        run_steps(engine, model, recipe, material, range(first, steps), metrics, stop, watchdog, identity)

    watchdog.watch("writing the adapter")
    if material.validation is None:
        save_trained(model, recipe, material.tokenizer)
    else:
        material.validation.finish()
    engine.reduce(torch.zeros(1, device=engine.device))  # no rank leaves before the adapter is written
    watchdog.watch(None)
    if engine.rank == 0:
        write_report(Path(recipe.output_dir))
    return trained_folder(recipe)


def prepare(engine: Engine, recipe: Recipe) -> Material:
    """Read and encode the task's training examples; UserError where they or the tokenizer do not fit."""
    task = get_task(recipe.task)
    examples, *_ = hold_out(load_examples(task, "train", recipe.data_dir), recipe.train.held_out)
    tokenizer = load_tokenizer(recipe.model)
    validation = None
    data: Texts | Encoded
    if task.num_labels:
        validation = Validation(engine, recipe, task, tokenizer)
        data = encode_texts(examples, task, tokenizer, recipe.train.max_length)
    else:
        cache = Path(recipe.data_dir) / ".tokens"
        data = encode(examples, task, tokenizer, recipe.train.max_length, cache_dir=cache)
    return Material(data, tokenizer, validation, fingerprint(examples))


def choose_later(engine: Engine, model: nn.Module, recipe: Recipe, material: Material) -> None:
    """Choose the connections of a selection that looks at gradients; those by weight were chosen at loading."""
    if recipe.adapter.method != "neuroada" or not recipe.adapter.selects_later:
        return

    def backward_of_first() -> None:
        chosen = global_batch(0, CALIBRATION, len(material.data), recipe.train.seed)
        # Not through the engine, which would count this pass as a part of a step.
        partial_loss(model, engine.device, recipe, material, chosen, of=chosen).backward()
        engine.release()

    choose_connections(engine, cast(Any, model).base_model, recipe, backward_of_first)


@contextmanager
def record(engine: Engine, recipe: Recipe, model: nn.Module, steps: int, first: int) -> Iterator[Metrics | None]:
    """Rank 0's files of the run: its recipe, its facts and its metrics."""
    if engine.rank != 0:
        yield None
        return
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "recipe.yaml")
    write_facts(
        folder,
        trainable=trainable(model),
        parameters=base_numel(model),
        steps=steps,
        strategy=strategy(engine),
        world_size=engine.world_size,
        code=code_version(),
    )
    metrics = Metrics(recipe, steps, first)
    try:
        yield metrics
    finally:
        metrics.close()


def run_steps(
    engine: Engine,
    model: nn.Module,
    recipe: Recipe,
    material: Material,
    remaining: range,
    metrics: Metrics | None,
    stop: StopRequest,
    watchdog: Watchdog,
    identity: dict[str, Any],
) -> None:
    """The loop: train the steps `remaining` (from 0), with checkpoints, and validation at every epoch's end."""
    validation, steps = material.validation, remaining.stop
    for step in remaining:
        watchdog.watch(f"step {step + 1}")
        started = time.perf_counter()
        loss, tokens = run_micro_batches(engine, recipe, material, step)
        lr = lr_at(step, steps, recipe.optimizer)
        norm = engine.step(lr)
        done = step + 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            last = find_checkpoint(Path(recipe.output_dir)) or "none"
            raise UserError(
                f"step {done}: loss is {loss}, gradient norm {norm}; stopped. Lower optimizer.lr "
                f"({recipe.optimizer.lr}) or check the data; last good checkpoint: {last}"
            )
        if metrics is not None:
            metrics.log(done, loss, lr, norm, tokens, time.perf_counter() - started)
            if done == remaining.start + 3:  # the first ones also compile and allocate
                describe_time(time.perf_counter() - started, steps - done)
        # Before the checkpoint, so that a run that resumes there has it behind itself.
        if validation is not None and validation.due(done, steps, len(material.data)):
            if validation.improved(done):
                save_trained(model, recipe, material.tokenizer)
            validation.record()
        stopping = stop.agreed(engine)
        if stopping or done % recipe.checkpoint.every_steps == 0 or done == steps:
            save_checkpoint(engine, model, recipe, done, identity)
        if stopping and done < steps:
            raise Preempted(f"stopped at step {done} of {steps}, checkpoint saved; run the same command to go on")


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the run: whole global batches until every epoch is through, or train.max_steps."""
    steps = math.ceil(recipe.train.epochs * examples / recipe.train.global_batch_size)
    return min(steps, recipe.train.max_steps or steps)


def run_micro_batches(engine: Engine, recipe: Recipe, material: Material, step: int) -> tuple[float, int]:
    """Forward and backward of this rank's share of a step's global batch; (loss, real tokens) of the whole of it."""
    lengths = material.data.lengths
    batch = global_batch(step, recipe.train.global_batch_size, len(material.data), recipe.train.seed)
    loss = torch.zeros((), device=engine.device)
    # Dropout, where a model has any: from seed, step and rank alone, so that a resumed run draws the same.
    torch.manual_seed(hash((recipe.train.seed, step, engine.rank)) & 0x7FFF_FFFF)
    mine = share(batch, lengths, engine.rank, engine.world_size, recipe.train.micro_batch_size)
    for chosen in mine:
        part = partial_loss(engine.model, engine.device, recipe, material, chosen, of=batch)
        engine.backward(part)
        loss += part.detach()
    return engine.reduce(loss).item(), int(lengths[batch].sum())


def partial_loss(
    model: nn.Module, device: torch.device, recipe: Recipe, material: Material, chosen: np.ndarray, of: np.ndarray
) -> torch.Tensor:
    """Forward of the examples `chosen`: their part of the loss, which is a mean over all of the batch `of`."""
    data, pad_id = material.data, material.tokenizer.pad_token_id
    if isinstance(data, Texts):
        return text_loss(model, data.collate(chosen, pad_id, device), data.labels[chosen], len(of))
    micro = collate(data, chosen, recipe.train.packing, pad_id).to(device)
    return answer_loss(model, micro, int(data.num_answer_tokens[of].sum()))


def base_fingerprint(model: nn.Module) -> str | None:
    """A checksum of the base weights that are tuned (of NeuroAda; other methods leave it to the model's name)."""
    layers = [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
    return adapter_fingerprint(layers, "default") if layers else None
