"""The model to evaluate, in memory: an adapter merged into its base, which then costs nothing at inference."""

from typing import TYPE_CHECKING, Any

import torch

from neuroada.adapter.load import load_adapter
from neuroada.errors import UserError
from neuroada.evaluation.source import Source
from neuroada.hf.loading import load_pretrained, load_tokenizer
from neuroada.hf.model_folder import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(source: Source, dtype: str, device: torch.device) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model, merged with its adapter, and its tokenizer.

    `dtype`: fp32 | bf16 | auto: on a GPU as saved, on a CPU fp32. UserError: bf16 on a GPU without it, a model that
    cannot be loaded, an adapter that does not fit it.
    """
    from transformers import AutoModelForCausalLM

    if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"dtype: {torch.cuda.get_device_name(device)} has no bf16; give --dtype fp32")
    auto = torch.float32 if device.type == "cpu" else "auto"
    field = "base-model: " if source.adapter is not None else "model: "
    tokenizer = load_tokenizer(source.model, field)
    loaded: Any = load_pretrained(
        AutoModelForCausalLM, source.model, field, dtype=DTYPES.get(dtype, auto), device_map={"": device}
    )
    check_finite(loaded.named_parameters(), f"{field}{source.model}")
    if source.adapter is not None:
        loaded = load_adapter(loaded, source.adapter, f"{field}{source.model}").merge_and_unload()
    return loaded.eval(), tokenizer
