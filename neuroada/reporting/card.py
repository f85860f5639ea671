"""The model card: README.md beside the trained weights, ready for the hub."""

import json

import yaml

from neuroada.files import write_text
from neuroada.methods import Method
from neuroada.objectives import objective_class
from neuroada.registry import METHODS
from neuroada.reporting.published import footnotes, published_scores
from neuroada.runs.run_folder import RunFolder


def write_card(run: RunFolder) -> None:
    """Write README.md beside the trained weights. The license is left to whoever publishes."""
    method: type[Method] = METHODS.load(run.recipe["adapter"]["method"])
    saved = run.folder / method.folder
    if saved.is_dir():
        write_text(saved / "README.md", card(run, method))


def card(run: RunFolder, method: type[Method]) -> str:
    """The card's text."""
    recipe, metadata = run.recipe, run.metadata
    local = run.model != recipe["model"]
    objective = objective_class(recipe["task"], recipe.get("objective", {}).get("name", ""))
    front = {
        "base_model": run.model,
        "library_name": method.library,
        "pipeline_tag": objective.pipeline_tag,
        "tags": [recipe["adapter"]["method"], "fine-tuning", run.trained_on.replace("/", "-").replace(" ", "-")],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip()]
    if local:
        lines.append("# base_model was a local folder: give its hub id")
    lines += ["# license: yours to choose; the base model's terms apply as well", "---", ""]
    lines += [f"# {run.model}, {run.method}, trained on {run.trained_on}", ""]
    if metadata:
        share = 100 * metadata["trainable"] / metadata["parameters"]
        lines += [f"{metadata['trainable']:,} trainable parameters, {share:.4f} % of {metadata['parameters']:,}.", ""]
    use = method.usage.format(auto=objective.auto_name, base=json.dumps(run.model, ensure_ascii=False))
    lines += ["## Use", "", "```python", use.rstrip(), "```", ""]
    lines += ["## Results", "", *results(run), ""]
    lines += ["## Training", "", "```yaml", run.shown_recipe.rstrip(), "```", ""]
    if run.metrics:
        first, last = run.metrics[0], run.metrics[-1]
        lines += [f"Loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}.", ""]
    if metadata:
        versions = ", ".join(f"{name} {version}" for name, version in metadata["libraries"].items())
        lines += [f"{metadata['world_size']} rank(s), {metadata['strategy']}, {metadata['device']}; {versions}.", ""]
    return "\n".join(lines)


def results(run: RunFolder) -> list[str]:
    """A Markdown table of the accuracies, in %."""
    if not run.results:
        return ["Not scored yet."]
    stated = published_scores(run)
    header = ["task", "n", "sound rule", "published rule", *(["published table"] if stated else []), "base"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for task, entry in run.results.items():
        base = run.base_results.get(task, {}).get("sound", entry.get("frozen_base"))
        values = [entry["sound"], entry["published"], *([stated.get(task)] if stated else []), base]
        told = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {' | '.join([task, str(entry['n']), *told])} |")
    return [*lines, "", *(footnotes(run) if stated else [])]
