"""llama7b_math_authors against the authors' training loop, written out in plain torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_runs import losses
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from neuroada.config.recipe import Recipe, load_recipe
from neuroada.hf.loading import DTYPES, load_tokenizer
from neuroada.objectives import make_objective
from neuroada.training.trainer import train

STEPS, K = 16, 4


def tiny_version(tiny: Path, folder: Path, dtype: str, deltas: str) -> Recipe:
    """The recipe on a tiny model and generated problems, the weights in `dtype`."""
    fields = [f"model={tiny}", "task=arithmetic", f"data_dir={folder / 'data'}", f"output_dir={folder / 'run'}",
              "evaluate.tasks=[arithmetic]", "evaluate.limit=1", "engine.name=single", f"train.dtype={dtype}",
              f"adapter.delta_dtype={deltas}", f"train.max_steps={STEPS}", f"adapter.k={K}",
              "train.max_length=256"]  # fmt: skip
    return load_recipe("llama7b_math_authors", fields)


def add_deltas(model: torch.nn.Module, targets: list[str], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """A vector of new values for each weight, scattered onto a dense copy of it in every forward pass."""
    model.requires_grad_(False)
    params = []
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] not in targets:
            continue
        weight = layer.weight
        top = weight.abs().topk(K, dim=1).indices
        flat = (torch.arange(len(weight))[:, None] * weight.shape[1] + top).flatten()
        delta = torch.nn.Parameter(torch.zeros(len(flat), dtype=dtype))

        def forward(x: torch.Tensor, weight=weight, flat=flat, delta=delta) -> torch.Tensor:
            return F.linear(x, weight.flatten().scatter_add(0, flat, delta.to(weight.dtype)).view_as(weight))

        layer.forward = forward
        params.append(delta)
    return params


def padded(objective, chosen: np.ndarray) -> dict[str, torch.Tensor]:
    """The examples below each other, padded on the right; labels of the answer alone."""
    rows = [torch.from_numpy(np.array(objective.data.tokens(i), dtype=np.int64)) for i in chosen]
    labels = [row.clone() for row in rows]
    for label, i in zip(labels, chosen, strict=True):
        label[: objective.data.answer_start(i)] = -100
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], True, 0)
    return {"input_ids": pad(rows, True, 1), "attention_mask": mask, "labels": pad(labels, True, -100)}


def authors_curve(recipe: Recipe) -> dict[int, float]:
    """Their loop: the mean loss of each micro batch, divided by their number; AdamW, linear schedule, clipping at 1."""
    objective = make_objective(recipe)
    objective.load_data(load_tokenizer(recipe.model))
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=DTYPES[recipe.train.dtype]).train()
    params = add_deltas(model, recipe.adapter.target_modules, DTYPES[recipe.adapter.delta_dtype])
    optimizer = torch.optim.AdamW(params, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    curve = {}
    for step in range(STEPS):
        total = 0.0
        for chosen in objective.batch(step, 8).reshape(4, 2):  # accumulation 4, micro batches of 2
            loss = model(**padded(objective, chosen)).loss / 4
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve[step + 1] = total
    return curve


def test_the_authors_loop(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny_version(tiny, tmp_path, "fp32", "fp32")
    assert (recipe.train.global_batch_size, recipe.train.micro_batch_size) == (8, 2)
    train(recipe)
    found, expected = losses(Path(recipe.output_dir)), authors_curve(recipe)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-5)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"loss_average": "batch"}),
                                      "output_dir": str(tmp_path / "batch")})  # fmt: skip
    train(other)
    assert losses(tmp_path / "batch") != pytest.approx(expected, rel=1e-5)  # what the field is for


def test_the_authors_loop_with_bf16_deltas(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny_version(tiny, tmp_path, "fp32", "bf16")
    train(recipe)
    found, expected = losses(Path(recipe.output_dir)), authors_curve(recipe)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-6)
    other = tiny_version(tiny, tmp_path / "other", "fp32", "fp32")  # the deltas' dtype alone tells the curves apart
    train(other)
    assert losses(Path(other.output_dir)) != pytest.approx(expected, rel=1e-6)


def test_the_authors_loop_with_bf16_weights_and_deltas(tiny: Path, tmp_path: Path) -> None:
    """As the recipe is: products of packed and of padded rows round differently, so within what the weights' dtype is
    worth."""
    recipe = tiny_version(tiny, tmp_path, "bf16", "bf16")
    train(recipe)
    found, expected = losses(Path(recipe.output_dir)), authors_curve(recipe)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-4)
    other = tiny_version(tiny, tmp_path / "other", "fp32", "bf16")
    train(other)
    assert losses(Path(other.output_dir)) != pytest.approx(expected, rel=3e-4)
