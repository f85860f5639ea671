"""A saved classifier scored again, as the run that trained it scored it: the same texts, dtype and forward pass."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neuroada.adapter.load import load_adapter
from neuroada.config.recipe import Recipe, read_recipe
from neuroada.engines import find_device
from neuroada.engines.single import SingleEngine
from neuroada.environment import rank, world_size
from neuroada.errors import UserError
from neuroada.evaluation.results import make_header, read_scores
from neuroada.evaluation.source import Source
from neuroada.files import FolderLock, write_json
from neuroada.hf.attention import choose_attention
from neuroada.hf.head import hold_head_in_fp32, train_head_in_fp32
from neuroada.hf.loading import check_dtype, load_pretrained, load_tokenizer
from neuroada.hf.model_folder import check_finite
from neuroada.methods import make_method
from neuroada.objectives import make_objective
from neuroada.objectives.epoch_validation import EpochValidation, read_epochs
from neuroada.tasks.table import Task


def evaluate_classifier(source: Source, task: Task, arguments: Namespace) -> tuple[dict[str, Any], Path]:
    """(results.json's content, the folder it was written to). Collective: the model is whole on every rank.

    arguments: the command's data_dir, out, limit and dtype. The run's recipe says which part of the validation split is
    reported, the length of a text, and, where the arguments leave them open, limit and dtype.

    UserError: no recipe beside the classifier, one of another task, what `load_pretrained` and `load_adapter` refuse.
    """
    saved = source.adapter or Path(source.model)
    recipe = _recipe_of(saved, source.model, task)
    recipe.data_dir = arguments.data_dir
    recipe.evaluate.limit = arguments.limit or recipe.evaluate.limit
    if arguments.dtype != "auto":
        recipe.train.dtype = arguments.dtype
    out = Path(arguments.out or recipe.output_dir)
    names = {"model": recipe.model, "adapter": str(saved)}
    header = make_header(names, source.identity(), arguments.limit)
    read_scores(out, header)  # refuses a folder with the scores of another model
    scoring = _Scoring(recipe, source)
    validation = EpochValidation(scoring, recipe, task, load_tokenizer(recipe.model, "model: "), examples=1)
    chosen = [epoch for epoch in read_epochs(validation.file) if epoch.get("test") is not None][-1]
    validation.measure({key: chosen[key] for key in ("epoch", "step")})
    results = {**validation.results(saved), **header}
    if scoring.rank == 0:
        with FolderLock(out, field="--out "):
            write_json(out / "results.json", results)
    return results, out


def _recipe_of(saved: Path, model: str, task: Task) -> Recipe:
    """The recipe of the run that left `saved`, of this base model and in its present folder."""
    run = saved.resolve().parent
    if not (run / "recipe.yaml").is_file() or not (run / "validation.json").is_file():
        raise UserError(
            f"{saved}: a classifier is scored as its run scored it, and recipe.yaml and validation.json are not in the "
            f"folder above; give the adapter or model where launch/train.py wrote it"
        )
    recipe = read_recipe(run / "recipe.yaml")
    if recipe.task != task.name:
        raise UserError(f"task {task.name}: {saved} was trained on {recipe.trained_on}; score it on that")
    return recipe.model_copy(deep=True, update={"output_dir": str(run), "model": model})


class _Scoring(SingleEngine):
    """The model whole on every rank; the ranks share the texts."""

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self.recipe, self.device = recipe, find_device()
        self.rank, self.world_size = rank(), world_size()
        self.model = load_classifier(source, recipe, self.device)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        total = values.cpu()  # gloo's, on GPUs too
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.to(values.device)


def load_classifier(source: Source, recipe: Recipe, device: torch.device) -> nn.Module:
    """The classifier of a run in eval mode on `device`, computing as the run did: an adapter beside its base's weights,
    its head in fp32; or a whole model, whose values were rounded to train.dtype when they were saved."""
    method, (auto, options) = make_method(recipe), make_objective(recipe).auto_class()
    compute = check_dtype(recipe.train.dtype, device)
    how: dict[str, Any] = {"attn_implementation": choose_attention(recipe.train.packed, recipe.train.dtype, device)}
    model: nn.Module
    if source.adapter is None:
        model = load_pretrained(auto, source.model, "model: ", dtype=method.storage_dtype(compute), **how)
        method.prepare(model, device, compute)
    else:
        model = load_pretrained(auto, source.model, "base-model: ", options=options, dtype=compute, **how)
        hold_head_in_fp32(model)
        model = load_adapter(model, source.adapter, f"base-model: {source.model}")
        train_head_in_fp32(model)
    check_finite(model.named_parameters(), str(source.adapter or source.model))
    model.to(device).eval()
    return model
