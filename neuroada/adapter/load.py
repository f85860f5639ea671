"""An adapter's folder put on its base model, of any of PEFT's methods: whole, or an error."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from neuroada.adapter.adapter_file import AGAIN, PREFIX, TENSORS_FILE, check_finite, read_adapter, read_config
from neuroada.errors import UserError
from neuroada.files import read_header

if TYPE_CHECKING:
    from peft import PeftModel

OTHER = f"{AGAIN}, or give the base model that it was trained on"


def load_adapter(model: nn.Module, folder: Path, told: str) -> Any:
    """The PeftModel of `model`, which messages call `told`, with the adapter in `folder`, whose file is checked first.

    UserError: a damaged or incomplete file (as of `read_adapter`), an adapter of another model.
    """
    from peft import PeftModel

    config = read_config(folder)
    if config.peft_type == "NEUROADA":
        read_adapter(folder)
    else:
        check_finite(folder)
    try:
        tuned = PeftModel.from_pretrained(model, str(folder))
    except UserError:
        raise
    except Exception as error:  # whatever odd fields and shapes provoke
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines)[:200]
        raise UserError(
            f"adapter: {str(folder)!r} does not fit {told} ({reason}); give the base it was trained on as --base-model"
        ) from error
    check_loaded(tuned, folder)
    return tuned


def check_loaded(model: "PeftModel", folder: Path, adapter: str = "default") -> None:
    """After PEFT loaded `folder` into `model`, of any method: every tensor that the adapter needs came from its file.

    Not for sharded models: PEFT's own names are asked for. UserError: a tensor is missing, or one was left out.
    """
    from peft.utils import get_peft_model_state_dict

    path = folder / TENSORS_FILE
    stored = {tensor.name for tensor in read_header(path, AGAIN)[0]}
    needed = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    known = {f"{PREFIX}{name}" for name, _ in model.get_base_model().named_parameters()}  # embeddings saved beside it
    if absent := sorted(needed - stored):
        raise UserError(f"{path}: lacks {len(absent)} of the adapter's tensors, {absent[0]} among them; {OTHER}")
    if unused := sorted(stored - needed - known):
        raise UserError(f"{path}: holds {unused[0]}, which the adapter has no place for; {AGAIN}")
