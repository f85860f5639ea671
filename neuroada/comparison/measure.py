"""What is measured of one run: losses on what is held out, accuracies, sizes, times; of the merged model."""

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neuroada.comparison.runs import deciding
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.files import read_json, write_json
from neuroada.objectives import Objective, make_objective
from neuroada.registry import METHODS
from neuroada.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(folder: Path, base: bool) -> None:
    """Write `folder`/result.json. `base`: of the untrained model."""
    recipe = load_recipe(str(folder / "asked.yaml"))
    objective = make_objective(recipe)
    result: dict[str, Any] = {"recipe": deciding(recipe, base)}
    if not base:
        result |= costs(folder, recipe)
        scored = folder / "results.json"  # the run has scored itself, on all its ranks
        if scored.is_file():
            result["tasks"] = read_json(scored)["tasks"]
    if objective.generates:
        result |= of_loaded_model(folder, recipe, objective, base)
    else:
        result |= objective.recorded_losses({} if base else result["tasks"][recipe.task])
    write_json(folder / "result.json", result)


def of_loaded_model(folder: Path, recipe: Recipe, objective: Objective, base: bool) -> dict[str, Any]:
    """What loading the model shows: losses on what is held out; what merging costs; accuracies of the base."""
    import torch

    from neuroada.evaluation.evaluate import evaluate_tasks
    from neuroada.evaluation.load import load
    from neuroada.evaluation.source import Source, resolve_tasks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = Source.of_trained(folder / METHODS.load(recipe.adapter.method).folder, recipe.model)
    source = Source(recipe.model) if base else trained
    model, tokenizer = load(source, "auto", device)
    result: dict[str, Any] = {**objective.held_out_losses(model, tokenizer)}
    if not base:
        result["merged_cost"] = merged_cost(model, load(Source(recipe.model), "auto", device)[0])
    elif recipe.evaluate.tasks:
        scored = evaluate_tasks(
            model,
            tokenizer,
            resolve_tasks(recipe.evaluate.tasks),
            recipe.data_dir,
            folder,
            limit=recipe.evaluate.limit,
            trained_on=recipe.task,
            identity=source.identity(),
        )
        result["tasks"] = scored["tasks"]
    return result


def costs(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the run's own files say of its cost. Peak memory is before any checkpoint or adapter is written."""
    found = RunFolder.read(folder)
    settled = [line["step_seconds"] for line in found.metrics if line["step"] > 3]  # the first ones also compile
    saved = folder / METHODS.load(recipe.adapter.method).folder
    return {
        **{key: found.metadata[key] for key in ("trainable", "parameters", "device", "world_size")},
        "final_loss": found.metrics[-1]["loss"],
        "step_seconds": median(settled) if settled else None,
        "peak_memory_bytes": found.metrics[-1]["peak_memory_bytes"],
        "saved_bytes": sum(file.stat().st_size for file in saved.glob("*.safetensors")),
    }


def merged_cost(merged: "PreTrainedModel", base: "PreTrainedModel", repeats: int = 9) -> float:
    """Median time of a forward pass of 64 tokens after merging, as a multiple of the base model's, in turns."""
    import torch

    ids = torch.arange(64, device=base.device)[None] % base.config.get_text_config().vocab_size
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for is_merged, model in ((True, merged), (False, base)):
                started = perf_counter()
                model(ids).logits[0, -1, 0].item()  # waits for the device
                times[is_merged].append(perf_counter() - started)
    return median(times[True][1:]) / median(times[False][1:])
