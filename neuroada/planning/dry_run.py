"""A run without its weights: every stage of the recipe walked, what is missing told, nothing written or downloaded."""

from pathlib import Path

from neuroada.config.data import Data
from neuroada.config.recipe import Recipe
from neuroada.data.formats import make_reader
from neuroada.data.sources import find_source
from neuroada.engines import find_device
from neuroada.errors import UserError
from neuroada.hf.attention import describe_attention
from neuroada.hf.attention_sinks import has_sinks
from neuroada.hf.config import find_config, remedy
from neuroada.planning import report
from neuroada.planning.plan import make_plan
from neuroada.tasks.data import load_examples, possible_files
from neuroada.tasks.table import get_task


def dry_run(recipe: Recipe, ranks: int) -> str:
    """What a run of `recipe` on `ranks` ranks would find and need, as text.

    A download that is missing is told with the command that makes it; it is no error.

    Raises:
        UserError: what no download mends: an unknown task, malformed data, a target module the model has not, a batch
            that does not divide over the ranks.
    """
    missing: list[str] = []
    data = _task(recipe, missing) if recipe.data is None else _own(recipe.data)
    tokenizer = weights = "present"
    if not _has_file(recipe.model, "tokenizer_config.json"):
        tokenizer = _missing(missing, f"the tokenizer of {recipe.model}: {remedy(recipe.model)}")
    if not any(_has_file(recipe.model, name) for name in ("model.safetensors", "model.safetensors.index.json")):
        weights = _missing(missing, f"the weights of {recipe.model}: {remedy(recipe.model)}")
    lines = [
        f"recipe     {recipe.provenance}",
        f"data       {recipe.trained_on}: {data}",
        f"tokenizer  {tokenizer}",
        f"weights    {weights}",
    ]
    try:
        config, _ = find_config(recipe.model)
    except UserError as error:
        lines.append(f"model      {_missing(missing, str(error))}: not planned")
    else:
        attention = describe_attention(recipe.train.packed, recipe.train.dtype, find_device(), has_sinks(config))
        lines += [f"attention  {attention}", report.plan(make_plan(recipe, ranks)), f"output     {recipe.output_dir}"]
    lines += ["", "missing:", *(f"  {what}" for what in missing)] if missing else ["", "nothing is missing"]
    return "\n".join(lines)


def _task(recipe: Recipe, missing: list[str]) -> str:
    assert recipe.task is not None
    task = get_task(recipe.task)
    files = possible_files(task, "train", recipe.data_dir)
    if files and not any(file.is_file() for file in files):
        return _missing(missing, f"{files[0]}: neuroada fetch data {files[0].parent.relative_to(recipe.data_dir)}")
    return f"{len(load_examples(task, 'train', recipe.data_dir)):,} examples"


def _own(data: Data) -> str:
    """The sources by their files; of local ones the first row is read, and has to be of a format."""
    told = []
    for spec in data.datasets:
        source = find_source(spec, data.streaming)
        if not source.files:
            told.append(f"{spec.path} on the hub")
            continue
        first = next((row.values for row in source.rows() if isinstance(row.values, dict)), {})
        reader = make_reader(spec, first, has_template=True)
        told.append(f"{spec.path}, {reader.name}, {len(source.files)} file(s)")
    return "; ".join(told)


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
