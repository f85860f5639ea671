"""A model's configuration without its weights: from a folder, this package or the hub's cache, never downloaded."""

from pathlib import Path
from typing import Any

from neuroada.errors import UserError
from neuroada.files import read_json
from neuroada.hf.loading import is_path
from neuroada.hf.model_folder import AGAIN, first_line, read_config

CONFIGS = Path(__file__).parent / "configs"


def find_config(source: str) -> tuple[Any, str]:
    """(the model's configuration, where it was found): a local folder, this repository, the hub's cache; no download.

    `source` is a folder or a hub id. UserError if it is in none of them.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    kept = CONFIGS / f"{source.replace('/', '--')}.json"
    if (Path(source) / "config.json").is_file():
        path, origin = Path(source) / "config.json", "local folder"
    elif kept.is_file():
        path, origin = kept, "shipped with this package"
    else:
        try:
            cached = cached_file(source, "config.json", local_files_only=True)
        except (OSError, ValueError):
            cached = None
        if cached is None:
            raise UserError(
                f"model = {source}: its config.json is in no folder of that name, not in the hub's cache and not in "
                f"neuroada/hf/configs/; {remedy(source)}"
            )
        path, origin = Path(cached), "the hub's cache"
    values = read_config(path.parent) if path.name == "config.json" else read_json(path)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values), origin
    except Exception as error:  # whatever odd values provoke
        raise UserError(f"{path}: makes no configuration: {first_line(error)}; {AGAIN}") from error


def remedy(source: str) -> str:
    """How to come by a model that is not here."""
    if source.count("/") == 1 and not is_path(source):
        return f"hf download {source}"
    return "see `neuroada fetch model --help`"
