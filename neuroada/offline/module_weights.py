"""What needs the whole model in memory: merging classifiers and other methods' adapters, and comparing logits."""

import gc
from pathlib import Path
from typing import Any

import torch
from peft import TaskType

from neuroada.adapter.adapter_file import TENSORS_FILE, read_config
from neuroada.adapter.config import NeuroAdaType
from neuroada.adapter.load import load_adapter
from neuroada.errors import UserError
from neuroada.files import read_header
from neuroada.hf.loading import load_config, load_pretrained
from neuroada.hf.model_folder import check_finite
from neuroada.hf.quantised import pretrained_quantised
from neuroada.hf.quantised_config import stored_quantisation
from neuroada.quantised import Quantisation


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
    expected = _logits(model)
    del model
    gc.collect()
    _compare(expected, _logits(_load(merged, _labels(adapter))))


def verify_quantised(adapter: Path, base: Path, merged: Path, quantisation: Quantisation, dtype: torch.dtype) -> None:
    """The same of an adapter over a quantised base, computing in `dtype`; `merged` is dense or quantised."""
    model = load_adapter(_load_quantised(base, dtype, quantisation), adapter, str(base))
    expected = _logits(model)
    del model
    gc.collect()
    _compare(expected, _logits(_load_quantised(merged, dtype)))


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model.eval()(tokens).logits
    return logits


def _compare(expected: torch.Tensor, found: torch.Tensor) -> None:
    if not torch.equal(expected, found):
        furthest = (expected.float() - found.float()).abs().max().item()
        raise UserError(f"--verify: the merged logits differ from the adapter's by up to {furthest:.3g}; nothing kept")


def _adapted(adapter: Path, base: Path) -> Any:
    return load_adapter(_load(base, _labels(adapter)), adapter, str(base))


def _load_quantised(folder: Path, dtype: torch.dtype, quantisation: Quantisation | None = None) -> Any:
    """A causal LM in `dtype`: quantised as asked, or else as its files are."""
    from transformers import AutoModelForCausalLM

    stored = quantisation or stored_quantisation(load_config(str(folder)), str(folder))
    if stored is None:
        return load_pretrained(AutoModelForCausalLM, str(folder), "", dtype=dtype)
    return pretrained_quantised(AutoModelForCausalLM, str(folder), dtype, stored, torch.device("cpu"))


def _labels(adapter: Path) -> int | None:
    """Outputs of the classifier that was trained with the adapter; None for a causal language model's."""
    if read_config(adapter).task_type != TaskType.SEQ_CLS:
        return None
    path = adapter / TENSORS_FILE
    heads = [t for t in read_header(path)[0] if ".classifier." in t.name or ".score." in t.name]
    rows = [tensor.shape[0] for tensor in heads if len(tensor.shape) > 1]
    if not rows:
        raise UserError(f"{path}: holds no classifier; save the adapter again")
    return min(rows)  # its last layer has the fewest rows


def _load(folder: Path, labels: int | None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if labels is None:
        model = load_pretrained(AutoModelForCausalLM, str(folder), "", dtype="auto")
    else:
        options = {"num_labels": labels}
        model = load_pretrained(AutoModelForSequenceClassification, str(folder), "", options=options, dtype="auto")
    check_finite(model.named_parameters(), str(folder))
    return model
