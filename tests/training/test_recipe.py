import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from neuroada.config.recipe import RECIPES, Optimizer, Recipe, load_recipe
from neuroada.errors import UserError
from neuroada.training.schedule import lr_at


def test_overrides_are_read_as_yaml_and_checked_together() -> None:
    recipe = load_recipe(
        "tiny_arithmetic", ["optimizer.lr=1e-3", "train.max_steps=null", "adapter.target_modules=[q_proj]"]
    )
    assert (recipe.optimizer.lr, recipe.train.max_steps, recipe.adapter.target_modules) == (1e-3, None, ["q_proj"])


def test_the_resolved_recipe_alone_reproduces_the_run(tmp_path: Path) -> None:
    recipe = load_recipe("tiny_arithmetic", ["adapter.k=3"])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.kk=3"], "adapter.kk: no such field; did you mean k?"),
        (["trian.seed=1"], "trian: no such field; did you mean train?"),
        (["adapter.k=0"], "adapter.k = 0: input should be greater than or equal to 1"),
        (["adapter.k=many"], "adapter.k = 'many': input should be a valid integer"),
        (["adapter.selection=biggest"], "adapter.selection = 'biggest': input should be 'magnitude'"),
        (["optimizer.lr=-1"], "optimizer.lr = -1: input should be greater than 0"),
        (["optimizer.lr=.nan"], "optimizer.lr = nan: input should be a finite number"),
        (["adapter.target_modules=[]"], "adapter.target_modules = []: list should have at least 1 item"),
        (["engine.name=fsdp1"], "engine.name = 'fsdp1': did you mean fsdp2?"),
        (["engine.shard_size=2"], "engine.shard_size = 2: is of fsdp2, not of deepspeed; set engine.name=fsdp2"),
        (
            ["engine.cpu_offload=true"],
            "engine.cpu_offload = true: is of fsdp2, not of deepspeed; set engine.name=fsdp2",
        ),
        (["adapter.k"], "'adapter.k': overrides are written key=value"),
        (["adapter.k.deep=1"], "adapter.k.deep: k is a value, not a section"),
        (["adapter.k=0", "train.bogus=1"], "adapter.k = 0.*train.bogus"),
    ],
)
def test_mistakes_name_the_field_the_value_and_the_remedy(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[]", r"\[\]").replace("?", r"\?")) as mistake:
        load_recipe("tiny_arithmetic", overrides)
    assert "\n" not in str(mistake.value)


def test_unknown_recipes_get_the_nearest_names() -> None:
    with pytest.raises(UserError, match="did you mean tiny_arithmetic"):
        load_recipe("tiny_arithmetics")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must be a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))
    values = yaml.safe_load((RECIPES / "tiny_arithmetic.yaml").read_text())
    del values["model"], values["provenance"]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="model: missing; provenance: missing"):
        load_recipe(str(tmp_path / "short.yaml"))


def test_a_sharded_copy_s_ranks_must_divide_all_ranks() -> None:
    engine = load_recipe("tiny_arithmetic", ["engine.name=fsdp2", "engine.shard_size=2"]).engine
    assert [engine.shards(ranks) for ranks in (2, 4)] == [2, 2]
    with pytest.raises(UserError, match=r"engine\.shard_size = 2: does not divide 3 ranks"):
        engine.shards(3)


def test_global_batch_must_divide_over_ranks() -> None:
    recipe = load_recipe("tiny_arithmetic")
    assert [recipe.micro_batches(ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match=r"global_batch_size = 8: does not divide over 3 ranks; use 2"):
        recipe.micro_batches(3)


def test_a_micro_batch_is_the_largest_that_divides_a_ranks_share() -> None:
    recipe = load_recipe("tiny_arithmetic", ["train.global_batch_size=24", "train.micro_batch_size=5"])
    assert [(n, recipe.micro_batch(n), recipe.micro_batches(n)) for n in (1, 2, 3, 8)] == [
        (1, 4, 6), (2, 4, 3), (3, 4, 2), (8, 3, 1)]  # fmt: skip


def test_learning_rate_follows_transformers() -> None:
    import torch
    from transformers import get_linear_schedule_with_warmup

    settings = Optimizer(lr=2e-3, warmup_ratio=0.25)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, 20)
    for step in range(20):
        assert lr_at(step, 20, settings) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def _numbers(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted names of every field that takes one number, and no truth value or list."""
    for name, field in section.model_fields.items():
        if "list" in str(field.annotation):
            continue
        part = next((one for one in (field.annotation, *get_args(field.annotation)) if hasattr(one, "model_fields")), 0)
        if part:
            yield from _numbers(part, f"{before}{name}.")
        elif re.search(r"\b(int|float)\b", str(field.annotation)) and "bool" not in str(field.annotation):
            yield before + name


@pytest.mark.parametrize("field", sorted(set(_numbers(Recipe))))
@pytest.mark.parametrize("value", ["true", "'3'", "[3]", "1e400"])
def test_a_number_is_a_number(field: str, value: str) -> None:
    """true counts as 1 in Python, and a quoted number is a text."""
    with pytest.raises(UserError, match=re.escape(field)) as told:
        load_recipe("tiny_arithmetic", [f"{field}={value}"])
    assert "\n" not in str(told.value)


def test_a_field_that_stands_twice(tmp_path: Path) -> None:
    text = (RECIPES / "tiny_arithmetic.yaml").read_text()
    (tmp_path / "twice.yaml").write_text(f"{text}\nprovenance: again\n")
    with pytest.raises(UserError, match="key 'provenance' stands twice in one mapping"):
        load_recipe(str(tmp_path / "twice.yaml"))
