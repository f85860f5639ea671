"""What is measured of one run: losses on what is held out, accuracies, sizes, times; of the merged model."""

from functools import cache, partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neuroada.comparison import general_text
from neuroada.comparison.runs import deciding
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.evaluation.source import Source, resolve_tasks
from neuroada.files import read_json, write_json
from neuroada.objectives import make_objective
from neuroada.registry import METHODS
from neuroada.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(folder: Path, base: bool, text: str | None = None) -> None:
    """Write `folder`/result.json. `base`: of the untrained model; `text`: a file of general text to score too."""
    recipe = load_recipe(str(folder / "asked.yaml"))
    objective = make_objective(recipe)
    result: dict[str, Any] = {"recipe": deciding(recipe, base, text)}
    if not base:
        result |= costs(folder, recipe)
        scored = folder / "results.json"  # the run has scored itself, on all its ranks
        if scored.is_file():
            result["tasks"] = read_json(scored)["tasks"]
    entry = result.get("tasks", {}).get(recipe.trained_on, {})
    source = Source.of_trained(folder / METHODS.load(recipe.adapter.method).folder, recipe.model)
    loaded = cache(partial(_load, Source(recipe.model) if base else source))
    result |= objective.compared_losses(entry, loaded)
    if objective.generates:
        result |= of_loaded_model(folder, recipe, *loaded(), base)
    if text is not None:
        result["general_text"] = general_text.score(*loaded(), text, recipe.train.max_length)
    write_json(folder / "result.json", result)


def _load(source: Source) -> tuple[Any, Any]:
    import torch

    from neuroada.evaluation.load import load

    return load(source, "auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def of_loaded_model(folder: Path, recipe: Recipe, model: Any, tokenizer: Any, base: bool) -> dict[str, Any]:
    """What loading the model shows besides: what merging costs; accuracies of the base."""
    from neuroada.evaluation.evaluate import evaluate_tasks

    result: dict[str, Any] = {}
    if not base:
        result["merged_cost"] = merged_cost(model, _load(Source(recipe.model))[0])
    elif recipe.evaluate.tasks:
        scored = evaluate_tasks(
            model,
            tokenizer,
            resolve_tasks(recipe.evaluate.tasks),
            recipe.data_dir,
            folder,
            limit=recipe.evaluate.limit,
            trained_on=recipe.trained_on,
            identity=Source(recipe.model).identity(),
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
