"""A run without its weights: every stage of the recipe walked, what is missing told, nothing written or downloaded."""

from pathlib import Path

from neuroada.config.recipe import Recipe
from neuroada.engines import find_device
from neuroada.errors import UserError
from neuroada.hf.attention import describe_attention
from neuroada.hf.config import find_config, remedy
from neuroada.planning import report
from neuroada.planning.plan import make_plan
from neuroada.tasks.data import load_examples, possible_files
from neuroada.tasks.table import get_task


def dry_run(recipe: Recipe, ranks: int) -> str:
    """What a run of `recipe` on `ranks` ranks would find and need, as text.

    A download that is missing is told with the command that makes it; it is no mistake.

    Raises:
        UserError: what no download mends: an unknown task, malformed data, a target module the model has not, a batch
            that does not divide over the ranks.
    """
    task = get_task(recipe.task)
    missing: list[str] = []
    files = possible_files(task, "train", recipe.data_dir)
    if files and not any(file.is_file() for file in files):
        data = _missing(missing, f"{files[0]}: neuroada fetch data {files[0].parent.relative_to(recipe.data_dir)}")
    else:
        data = f"{len(load_examples(task, 'train', recipe.data_dir)):,} examples"
    tokenizer = weights = "present"
    if not _has_file(recipe.model, "tokenizer_config.json"):
        tokenizer = _missing(missing, f"the tokenizer of {recipe.model}: {remedy(recipe.model)}")
    if not any(_has_file(recipe.model, name) for name in ("model.safetensors", "model.safetensors.index.json")):
        weights = _missing(missing, f"the weights of {recipe.model}: {remedy(recipe.model)}")
    lines = [
        f"recipe     {recipe.provenance}",
        f"data       {recipe.task}: {data}",
        f"tokenizer  {tokenizer}",
        f"weights    {weights}",
        f"attention  {describe_attention(recipe.train.packing, recipe.train.dtype, find_device())}",
    ]
    try:
        find_config(recipe.model)
    except UserError as error:
        lines.append(f"model      {_missing(missing, str(error))}: not planned")
    else:
        lines += [report.plan(make_plan(recipe, ranks)), f"output     {recipe.output_dir}"]
    lines += ["", "missing:", *(f"  {what}" for what in missing)] if missing else ["", "nothing is missing"]
    return "\n".join(lines)


def _missing(missing: list[str], what: str) -> str:
    missing.append(what)
    return "missing"


def _has_file(source: str, name: str) -> bool:
    """Whether the model's folder, or its copy in the hub's cache, has the file."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(source).is_dir():
        return (Path(source) / name).is_file()
    try:
        return isinstance(try_to_load_from_cache(source, name), str)
    except HFValidationError:  # a path that is no folder
        return False
