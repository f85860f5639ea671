"""The model card: README.md beside the trained weights, ready for the hub."""

import yaml

from neuroada.reporting.record import Record

USE = {
    "adapter": """import neuroada  # PEFT knows the method from here on
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "THIS_REPOSITORY").merge_and_unload()  # inference costs nothing then
""",
    "model": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")
""",
}


def write_card(record: Record) -> None:
    """Write README.md into adapter/ or model/ of the run. The license is left to whoever publishes."""
    for kind in USE:
        folder = record.folder / kind
        if folder.is_dir():
            partial = folder / ".README.md.partial"
            partial.write_text(card(record, kind), encoding="utf-8")
            partial.replace(folder / "README.md")


def card(record: Record, kind: str) -> str:
    """The card's text. `kind`: adapter or model."""
    recipe, facts = record.recipe, record.facts
    local = record.model != recipe["model"]
    front = {
        "base_model": record.model,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-classification" if recipe["task"].startswith("glue/") else "text-generation",
        "tags": [recipe["adapter"]["method"], "fine-tuning", recipe["task"].replace("/", "-")],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip()]
    if local:
        lines.append("# base_model was a local folder: give its hub id")
    lines += ["# license: yours to choose; the base model's terms apply as well", "---", ""]
    lines += [f"# {record.model}, {record.method}, trained on {recipe['task']}", ""]
    if facts:
        share = 100 * facts["trainable"] / facts["parameters"]
        lines += [f"{facts['trainable']:,} numbers were trained, {share:.4f} % of {facts['parameters']:,}.", ""]
    use = USE[kind].format(base=record.model)
    if recipe["task"].startswith("glue/"):
        use = use.replace("ForCausalLM", "ForSequenceClassification")
    if recipe["adapter"]["method"] != "neuroada":
        use = use.replace("import neuroada  # PEFT knows the method from here on\n", "")
    lines += ["## Use", "", "```python", use.rstrip(), "```", ""]
    lines += ["## Results", "", *results(record), ""]
    lines += ["## Training", "", "```yaml", record.shown_recipe.rstrip(), "```", ""]
    if record.metrics:
        first, last = record.metrics[0], record.metrics[-1]
        lines += [f"Loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}.", ""]
    if facts:
        versions = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
        lines += [f"{facts['world_size']} rank(s), {facts['strategy']}, {facts['device']}; {versions}.", ""]
    return "\n".join(lines)


def results(record: Record) -> list[str]:
    """A Markdown table of the accuracies, in %."""
    if not record.results:
        return ["Not scored yet."]
    stated = record.published
    header = ["task", "n", "sound rule", "published rule", *(["published table"] if stated else []), "base"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for task, entry in record.results.items():
        base = record.base_results.get(task, {}).get("sound", entry.get("frozen_base"))
        values = [entry["sound"], entry["published"], *([stated.get(task)] if stated else []), base]
        told = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {' | '.join([task, str(entry['n']), *told])} |")
    return [*lines, "", *(record.footnotes if stated else [])]
