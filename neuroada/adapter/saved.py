"""An adapter's folder, written from any engine: the same files that PEFT's `save_pretrained` writes from one."""

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from neuroada import sharding
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.fingerprint import record_base
from neuroada.adapter.layer import NeuroAdaLinear


def save_adapter(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Write `folder` in PEFT's format, one parameter gathered at a time. Collective; rank 0 writes.

    Works for every PEFT method: what trains is saved, and NeuroAda's indices with it.
    """
    config = model.peft_config[adapter]
    layers = [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
    if layers:
        record_base(cast(NeuroAdaConfig, config), layers, adapter)
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        if not (param.requires_grad or f".neuroada_idx.{adapter}" in name):
            continue
        with sharding.whole(param) as value:
            if first:
                key = name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", "")
                tensors[key] = value.detach().to("cpu", copy=True).contiguous()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{SAFETENSORS_WEIGHTS_NAME}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(folder / SAFETENSORS_WEIGHTS_NAME)
        inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = inference
