"""The model to evaluate, in memory: an adapter merged into its base, which then costs nothing at inference."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neuroada.adapter.adapter_file import read_config
from neuroada.adapter.fingerprint import quantisation_in
from neuroada.adapter.load import load_adapter
from neuroada.errors import UserError
from neuroada.evaluation.source import Source
from neuroada.hf.loading import load_config, load_pretrained, load_tokenizer
from neuroada.hf.model_folder import check_finite
from neuroada.hf.quantised import pretrained_quantised
from neuroada.hf.quantised_config import stored_quantisation
from neuroada.quantised import Quantisation

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
    quantisation = quantisation_of(source.model, source.adapter)
    if quantisation is not None:
        compute = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
        loaded: Any = pretrained_quantised(AutoModelForCausalLM, source.model, compute, quantisation, device)
    else:
        loaded = load_pretrained(
            AutoModelForCausalLM, source.model, field, dtype=DTYPES.get(dtype, auto), device_map={"": device}
        )
    check_finite(loaded.named_parameters(), f"{field}{source.model}")
    if source.adapter is not None:
        loaded = load_adapter(loaded, source.adapter, f"{field}{source.model}").merge_and_unload()
    return loaded.eval(), tokenizer


def quantisation_of(model: str, adapter: Path | None) -> Quantisation | None:
    """How the base is to be stored: as the adapter was trained over it, else as the model's own files are."""
    named = getattr(read_config(adapter), "base_fingerprint", None) if adapter is not None else None
    return quantisation_in(named) or stored_quantisation(load_config(model), model)
