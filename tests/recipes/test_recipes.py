"""Every recipe: it loads, its model has the known counts, and its dry run finds nothing missing but downloads."""

import math
from pathlib import Path

import pytest
import yaml

from neuroada.config.recipe import RECIPES, load_recipe
from neuroada.engines import base_parameters
from neuroada.hf.config import CONFIGS, find_config
from neuroada.methods import make_method
from neuroada.objectives import make_objective
from neuroada.planning import plan
from neuroada.planning.dry_run import dry_run
from neuroada.planning.meta_model import on_meta
from neuroada.tasks.table import get_task

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
OURS = [name for name in NAMES if name.startswith(("llama", "qwen", "mistral", "mixtral", "gpt", "roberta"))]

# Trained connections per k, and parameters of the base model (of RoBERTa: with a classifier of two labels).
COUNTS = {
    "yahma/llama-7b-hf": (1_359_872, 6_738_415_616),
    "yahma/llama-13b-hf": (2_129_920, 13_015_864_320),
    "meta-llama/Llama-2-7b-hf": (1_359_872, 6_738_415_616),
    "meta-llama/Meta-Llama-3-8B": (1_376_256, 8_030_261_248),
    "meta-llama/Llama-3.1-8B": (1_376_256, 8_030_261_248),
    "meta-llama/Llama-3.2-1B": (16 * 23_552, 1_235_814_400),
    "meta-llama/Llama-3.2-3B": (28 * 27_648, 3_212_749_824),
    "meta-llama/Llama-3.3-70B-Instruct": (80 * 83_968, 70_553_706_496),
    # A layer's neurons: q, k and v, o, gate and up, down; of a mixture's attention, then of each expert.
    "Qwen/Qwen3-0.6B": (28 * (2_048 + 2_048 + 1_024 + 6_144 + 1_024), 596_049_920),
    "Qwen/Qwen3-1.7B": (28 * (2_048 + 2_048 + 2_048 + 12_288 + 2_048), 1_720_574_976),
    "Qwen/Qwen3-4B": (36 * (4_096 + 2_048 + 2_560 + 19_456 + 2_560), 4_022_468_096),
    "Qwen/Qwen3-8B": (36 * 38_912, 8_190_735_360),
    "Qwen/Qwen3-30B-A3B": (48 * (4_096 + 1_024 + 2_048 + 128 * (1_536 + 2_048)), 30_532_122_624),
    "mistralai/Mixtral-8x7B-v0.1": (32 * (4_096 + 2_048 + 4_096 + 8 * (28_672 + 4_096)), 46_702_792_704),
    "unsloth/gpt-oss-20b-BF16": (24 * (4_096 + 1_024 + 2_880 + 32 * (5_760 + 2_880)), 20_914_757_184),
    "mistralai/Mistral-7B-v0.1": (1_376_256, 7_241_732_096),
    "mistralai/Mistral-7B-v0.3": (1_376_256, 7_248_023_552),
    "FacebookAI/roberta-base": (12 * 6_912, 124_647_170),
    "FacebookAI/roberta-large": (24 * 9_216, 355_361_794),
}

# Published for LLaMA-7B: lr, global batch, micro batch, warm-up ratio, weight decay.
PUBLISHED = {
    "llama7b_commonsense_top1": (8e-3, 8, 8, 0.1, 0.0),
    "llama7b_commonsense": (7e-4, 16, 16, 0.06, 0.0),
    "llama7b_math_top1": (9e-3, 16, 2, 0.06, 0.0),
    "llama7b_math": (3e-3, 8, 2, 0.0, 0.1),
    "llama7b_math_authors": (3e-3, 8, 2, 0.0, 0.1),
}


def test_every_model_has_its_recipes():
    for model in ("llama7b", "llama13b", "llama2_7b", "llama3_8b"):
        assert {f"{model}_{task}{k}" for task in ("math", "commonsense") for k in ("", "_top1")} <= set(OURS)
    for size in ("base", "large"):
        assert len([name for name in OURS if name.startswith(f"roberta_{size}_")]) == 2 * 8  # k = 20 and k = 1
        twins = {name.removesuffix("_top1") for name in OURS if name.startswith(f"roberta_{size}_")}
        for name in twins:
            one, twenty = (load_recipe(name + end) for end in ("_top1", ""))
            assert one.task == twenty.task and one.train == twenty.train and one.optimizer.lr > twenty.optimizer.lr
    assert {load_recipe(name).model for name in OURS} == set(COUNTS)
    assert {path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")} == set(COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_a_node_of_any_size(name):
    """As it is: `deepspeed launch/train.py --recipe ...`."""
    for ranks in (1, 2, 4, 8):
        assert load_recipe(name).micro_batches(ranks) >= 1


@pytest.mark.parametrize("model", COUNTS)
def test_counts_of_each_model(model):
    recipe = next(
        recipe for name in OURS if (recipe := load_recipe(name)).model == model and name != "roberta_base_mnli"
    )
    recipe.task = "glue/sst2" if "roberta" in model else recipe.task
    recipe.adapter.k = 1
    adapted = on_meta(find_config(model)[0], recipe, make_method(recipe), make_objective(recipe))
    per_k, parameters = COUNTS[model]
    assert base_parameters(adapted) == parameters
    deltas = [(name, param) for name, param in adapted.named_parameters() if "neuroada_delta" in name]
    assert sum(param.numel() for _, param in deltas) == per_k
    others = [
        name for name, param in adapted.named_parameters() if param.requires_grad and "neuroada_delta" not in name
    ]
    assert all("classifier" in name for name in others)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_to_the_letter(name):
    recipe = load_recipe(name)
    optimizer, train = recipe.optimizer, recipe.train
    values = (
        optimizer.lr,
        train.global_batch_size,
        train.micro_batch_size,
        optimizer.warmup_ratio,
        optimizer.weight_decay,
    )
    assert values == PUBLISHED[name]
    assert (train.epochs, train.max_length, train.dtype, train.seed) == (3, 512, "bf16", 42)
    assert (optimizer.schedule, optimizer.max_grad_norm) == ("linear", 1.0)


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_is_whole_and_says_where_it_comes_from(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    recipe = load_recipe(name)
    as_theirs = recipe.train.loss_average == "micro_batch" and recipe.adapter.delta_dtype == "bf16"
    origin = "published" if as_theirs else "hyper-parameters published"
    assert recipe.provenance.startswith(origin if name in PUBLISHED else "extrapolated")
    assert recipe.output_dir == f"runs/{name}"
    assert recipe.adapter.k == (1 if name.endswith("_top1") else 20)
    assert all(len(line) <= 120 for line in text.splitlines())
    written = yaml.safe_load(text)
    for section in ("adapter", "optimizer", "train", "checkpoint", "engine"):
        assert section in written
    assert all(get_task(task).suite == get_task(recipe.task).suite for task in recipe.evaluate.tasks or [])
    assert bool(recipe.evaluate.tasks) == (get_task(recipe.task).suite != "glue")  # a classifier is scored as it trains


@pytest.fixture(scope="module")
def remembered():
    """Fake steps of recipes alike in all that decides one, taken once."""
    steps, record = {}, plan.record_step

    def record_once(recipe, config, accumulating, method=None):
        train = {"micro_batch_size", "max_length", "packing", "dtype", "activation_checkpointing"}
        key = (recipe.model, get_task(recipe.task).num_labels, recipe.adapter.model_dump_json(),
               recipe.train.model_dump_json(include=train), accumulating, method)  # fmt: skip
        if key not in steps:
            steps[key] = record(recipe, config, accumulating, method)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "record_step", record_once)
        yield


@pytest.mark.parametrize("name", [name for name in NAMES if load_recipe(name).task])  # own data must be there
def test_dry_run(name, remembered, tmp_path):
    recipe = load_recipe(name, [f"data_dir={tmp_path}"])
    ranks = 16 if "70b" in name else 1
    said = dry_run(recipe, ranks)
    assert "missing" in said and not any(tmp_path.iterdir())
    if name in OURS:
        config = find_config(recipe.model)[0]
        per_k, _ = COUNTS[recipe.model]
        if get_task(recipe.task).suite != "glue":
            assert f"trainable  {per_k * recipe.adapter.k:,} of" in said
        assert f"on {ranks} rank(s)" in said and math.isfinite(config.num_hidden_layers)
        assert f"neuroada fetch data {get_task(recipe.task).train_file}" in said


def test_dry_run_finds_the_data(shared_data):
    data = shared_data / "llm_adapters"
    if not (data / "math_10k" / "train.json").is_file():
        pytest.skip(f"no math_10k in {Path(data)}")
    said = dry_run(load_recipe("llama32_1b_math", [f"data_dir={data}"]), ranks=2)
    assert "9,919 examples" in said and "3,720 steps" in said
