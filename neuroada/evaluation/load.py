"""The model to evaluate, in memory: an adapter merged into its base, which then costs nothing at inference."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from neuroada.errors import UserError
from neuroada.evaluation.source import Source
from neuroada.files import read_json
from neuroada.hf.loading import load_config
from neuroada.hf.quantised import pretrained_quantised, stored_quantisation
from neuroada.quantised import Quantisation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(source: Source, dtype: str, device: torch.device) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model, merged with its adapter, and its tokenizer.

    `dtype`: fp32 | bf16 | auto: on a GPU as saved, on a CPU fp32. UserError: bf16 on a GPU without it, a model that
    cannot be loaded, an adapter that does not fit it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"dtype: {torch.cuda.get_device_name(device)} has no bf16; give --dtype fp32")
    auto = torch.float32 if device.type == "cpu" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.model)
        quantisation = quantisation_of(source.model, source.adapter)
        if quantisation is not None:
            chosen = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
            model = pretrained_quantised(AutoModelForCausalLM, source.model, chosen, quantisation, device)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source.model, dtype=DTYPES.get(dtype, auto), device_map={"": device}
            )
    except (OSError, ValueError) as error:
        hint = "give its folder as --base-model DIR" if source.adapter else "give the folder of a causal LM"
        raise UserError(f"model: {source.model!r} cannot be loaded ({str(error)[:200]}); {hint}") from None
    if source.adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload()
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"adapter: {str(source.adapter)!r} does not fit {source.model!r} ({str(error)[:200]}); "
                "give the base it was trained on as --base-model DIR"
            ) from None
    return model.eval(), tokenizer


def quantisation_of(model: str, adapter: Path | None) -> Quantisation | None:
    """How the base is to be stored: as the adapter was trained over it, else as the model's own files are."""
    if adapter is not None:
        path = adapter / "adapter_config.json"
        named = read_json(path).get("base_quantisation")
        return Quantisation.from_json(named, f"{path}: base_quantisation") if named else None
    return stored_quantisation(load_config(model), model)
