"""An adapter's folder put on its base model, of any of PEFT's methods: whole, or an error."""

from pathlib import Path
from typing import Any

from torch import nn

from neuroada.adapter.adapter_file import check_finite, check_loaded, read_adapter, read_config
from neuroada.errors import UserError


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
