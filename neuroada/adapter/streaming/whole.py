"""What needs the whole model in memory: merging adapters of other methods, and comparing logits."""

import gc
from pathlib import Path
from typing import Any

import torch

from neuroada.adapter.config import NeuroAdaType
from neuroada.errors import UserError


def merge_whole(adapter: Path, base: Path, out: Path) -> None:
    """Merge by PEFT, in the base's dtype, and save to `out`."""
    _adapted(adapter, base).merge_and_unload().save_pretrained(out)


def verify_logits(adapter: Path, base: Path, merged: Path) -> None:
    """Compare the logits of base + adapter with the merged model's, on the CPU in the base's dtype: equal to the bit.

    On two sequences of 32 random tokens. One model in memory at a time. UserError where they differ.
    """
    model = _adapted(adapter, base)
    if model.peft_config["default"].peft_type != NeuroAdaType.NEUROADA:
        model = model.merge_and_unload()  # others round differently before they are merged
    tokens = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.eval()(tokens).logits
        del model
        gc.collect()
        found = _load(merged).eval()(tokens).logits
    if not torch.equal(expected, found):
        furthest = (expected.float() - found.float()).abs().max().item()
        raise UserError(f"--verify: the merged logits differ from the adapter's by up to {furthest:.3g}; nothing kept")


def _adapted(adapter: Path, base: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(_load(base), str(adapter))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--adapter {adapter}: does not fit {base} ({reason}); give its own as --base-model") from None


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: not loaded as a causal language model ({reason})") from None
