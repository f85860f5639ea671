"""What needs the whole model in memory: merging classifiers and other methods' adapters, and comparing logits."""

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType
from safetensors import safe_open

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
        found = _load(merged, _labels(adapter)).eval()(tokens).logits
    if not torch.equal(expected, found):
        furthest = (expected.float() - found.float()).abs().max().item()
        raise UserError(f"--verify: the merged logits differ from the adapter's by up to {furthest:.3g}; nothing kept")


def _adapted(adapter: Path, base: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(_load(base, _labels(adapter)), str(adapter))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--adapter {adapter}: does not fit {base} ({reason}); give its own as --base-model") from None


def _labels(adapter: Path) -> int | None:
    """Outputs of the classifier that was trained with the adapter; None for a causal language model's."""
    if PeftConfig.from_pretrained(str(adapter)).task_type != TaskType.SEQ_CLS:
        return None
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".classifier." in name or ".score." in name]  # noqa: SIM118 (no dict)
        shapes = [file.get_slice(name).get_shape() for name in names]
    return min(rows for rows, *columns in shapes if columns)  # its last layer has the fewest rows


def _load(folder: Path, labels: int | None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        if labels is None:
            return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        # Another task's classifier may stand in the base's files.
        return AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", num_labels=labels, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = "causal language model" if labels is None else "classifier"
        raise UserError(f"{folder}: not loaded as a {kind} ({reason})") from None
