"""DeepSpeed's JSON: one of ds_configs/ or the user's own, with what the recipe owns refused."""

from pathlib import Path
from typing import Any

from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.files import read_json

DS_CONFIGS = Path(__file__).parent / "ds_configs"

OWNED = {
    "optimizer": "the recipe's optimizer section is used",
    "scheduler": "the recipe's optimizer.schedule is used",
    "bf16": "train.dtype decides",
    "fp16": "train.dtype decides (bf16 or fp32)",
    "gradient_clipping": "optimizer.max_grad_norm decides",
    "train_batch_size": "train.global_batch_size decides",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size decides",
    "gradient_accumulation_steps": "train.global_batch_size decides",
}
QUANTISING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def read_ds_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The strategy's JSON.

    Raises:
        UserError: a setting that the recipe owns, or that would corrupt indices or train something else.
    """
    name = recipe.engine.ds_config
    path = next((p for p in (DS_CONFIGS / f"{name}.json", Path(name)) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise UserError(f"engine.ds_config = {name}: no such file in ds_configs/ ({known}) and no such path")
    config = read_json(path, limit=1 << 20)
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"engine.ds_config = {name}: {path} must be an object, and its zero_optimization another")
    for field, remedy in OWNED.items():
        if field in config:
            raise UserError(f"engine.ds_config = {name}: remove {field} from {path.name}: {remedy}")
    zero = config.get("zero_optimization", {})
    for field in QUANTISING:
        if zero.get(field):
            raise UserError(f"engine.ds_config = {name}: {field} would quantise the indices too; set it to false")
    hpz = zero.get("zero_hpz_partition_size", 1)
    if type(hpz) is not int or hpz < 1:
        raise UserError(f"engine.ds_config = {name}: zero_hpz_partition_size = {hpz!r} is not at least 1")
    if world_size % hpz:
        raise UserError(
            f"engine.ds_config = {name}: zero_hpz_partition_size = {hpz} does not divide {world_size} ranks; "
            f"set it to the ranks of a node"
        )
    return config


def zero_options(strategy: str) -> dict[str, Any]:
    """The zero_optimization section of ds_configs/<strategy>.json; empty where there is none."""
    path = DS_CONFIGS / f"{strategy}.json"
    section: dict[str, Any] = read_json(path)["zero_optimization"] if path.is_file() else {}
    return section
