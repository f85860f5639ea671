"""`neuroada plan --compare` of every recipe: a table, whatever the model, task and storage of the base."""

from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig

from neuroada.cli import plan as command
from neuroada.config.recipe import RECIPES, Recipe, load_recipe
from neuroada.hf.config import CONFIGS, find_config
from neuroada.methods import Method
from neuroada.planning import plan
from neuroada.planning.step import RECORDED_LAYERS, Step
from neuroada.tasks.table import get_task

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LOCAL = {"models/smollm2-135m": LlamaConfig, "models/tiny": LlamaConfig, "models/minilm-l6": BertConfig}
"""Models that a recipe expects in a folder, and their architecture."""

EVERYWHERE = {"frozen", "neuroada"}
WITH_WEIGHTS = {"lora", "dora", "shira", "random_entries", "supertuning", "masked", "full"}
"""Methods that run beside or in unquantised Linear weights."""


def short_config(model: str) -> tuple[Any, str]:
    """The model's configuration with as many layers as a step records (a plan repeats one of them), of small sizes."""
    if model in LOCAL:
        kind = LOCAL[model]
        config = kind(hidden_size=256, intermediate_size=512, num_attention_heads=4, vocab_size=256)
        origin = "made for this test"
    else:
        config, origin = find_config(model)
    config.num_hidden_layers = RECORDED_LAYERS
    if isinstance(config, LlamaConfig):  # quantised weights are read in blocks of rows: fewer of them
        config.update({"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
        config.update({"num_attention_heads": 4, "num_key_value_heads": 4})
    if getattr(config, "num_experts", 0) > 8:
        config.num_experts = 8
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:RECORDED_LAYERS]
    return config, origin


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """Models of few layers, and one recording for recipes that run the same code: sizes (of the model, the batch, k and
    the classifier) are in shapes alone."""
    steps: dict[Any, Step] = {}
    record = plan.record_step

    def record_once(recipe: Recipe, config: Any, accumulating: bool, method: Method) -> Step:
        task = get_task(recipe.task) if recipe.task else None
        kind = (task.objective, task.num_labels == 1) if task else recipe.objective.name
        train = recipe.train.model_dump_json(include={"packing", "dtype", "activation_checkpointing"})
        fields = recipe.adapter.model_dump_json(exclude={"k"})
        model = (config.model_type, config.tie_word_embeddings, getattr(config, "sliding_window", None) is None)
        key = (model, kind, train, fields, recipe.base.model_dump_json(), accumulating, method.name)
        if key not in steps:
            steps[key] = record(recipe, config, accumulating, method)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "record_step", record_once)
        patch.setattr(plan, "find_config", short_config)
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_compared(name, capsys):
    recipe = load_recipe(name)
    command.main(["--recipe", name, "--compare"])
    said = capsys.readouterr().out
    head, _, table = said.partition("\n\n")
    assert recipe.model in head and "nan" not in said
    lines = table.splitlines()
    rows = {line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  method")}
    left_out = [line for line in lines if line.startswith("left out: ")]
    expected = EVERYWHERE if recipe.base.model_dtype or recipe.adapter.target_parameters else EVERYWHERE | WITH_WEIGHTS
    if recipe.task and get_task(recipe.task).suite == "glue":
        expected = expected | {"head", "bitfit"}
    if recipe.adapter.target_parameters:  # it adapts no experts, but trains them with everything else
        expected = expected | {"full"} if "full" in rows else expected
    assert rows == expected, left_out
    assert len(rows) + len(left_out) == 1 + len(plan.METHODS.names())
    assert all("adapter." in line for line in left_out)


def test_local_models_are_those_of_the_recipes():
    models = {load_recipe(name).model for name in NAMES}
    assert {model for model in models if not (CONFIGS / f"{model.replace('/', '--')}.json").is_file()} == set(LOCAL)
