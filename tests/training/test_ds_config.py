"""DeepSpeed configurations that the recipe overrules, or that would corrupt the indices, are refused before a weight is
loaded."""

import json
from pathlib import Path

import pytest

from neuroada.config.ds_config import DS_CONFIGS, read_ds_config
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError


def read(config: object, folder: Path, ranks: int = 4) -> dict:
    path = folder / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return read_ds_config(load_recipe("tiny_arithmetic", [f"engine.ds_config={path}"]), ranks)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_ours_are_accepted(path: Path) -> None:
    config = read_ds_config(load_recipe("tiny_arithmetic", [f"engine.ds_config={path.stem}"]), 8)
    assert config["zero_optimization"]["stage"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, "remove optimizer from mine.json: the recipe's optimizer section is used"),
        ({"scheduler": {}}, "remove scheduler"),
        ({"fp16": {"enabled": True}}, "remove fp16 from mine.json: train.dtype decides"),
        ({"bf16": {"enabled": True}}, "remove bf16"),
        ({"train_batch_size": 8}, r"remove train_batch_size .*train.global_batch_size decides"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights would quantise"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "zero_hpz_partition_size = 3 does not"),
        ("{", "mine.json: not JSON"),
    ],
)
def test_the_field_and_the_reason_are_named(config: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(config, tmp_path)


def test_unknown_names_get_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"engine.ds_config = zero9: no such file in ds_configs/ \(zero1, zero2, zero3"):
        read_ds_config(load_recipe("tiny_arithmetic", ["engine.ds_config=zero9"]), 2)
