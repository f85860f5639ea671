"""An adapter's folder, written from any engine: the same files that PEFT's `save_pretrained` writes from one."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from neuroada import sharding
from neuroada.adapter.adapter_file import sha256_of
from neuroada.adapter.config import NeuroAdaConfig
from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.layer import neuroada_layers
from neuroada.adapter.model import NeuroAdaModel
from neuroada.errors import UserError
from neuroada.files import save_tensors


def save_adapter(
    model: PeftModel,
    folder: Path,
    adapter: str = "default",
    complete: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> None:
    """Write `folder` in PEFT's format, one parameter gathered at a time. Collective; rank 0 writes.

    Works for every PEFT method: what trains is saved, and of NeuroAda this adapter's connections, deltas in fp32,
    whatever dtype they trained in. complete: adds, on rank 0, what is no parameter and belongs to the file.
    """
    config = model.peft_config[adapter]
    layers = [layer for layer in neuroada_layers(model) if adapter in layer.neuroada_idx]
    for layer in layers:
        if not layer.is_selected(adapter):
            raise UserError(f"adapter {adapter!r} has no connections in {layer.name} yet: there is nothing to save")
    if layers:
        cast(NeuroAdaConfig, config).trained_on = fingerprint(layers, adapter)
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        # An adapter that was loaded to be used has no gradients, and is saved all the same.
        connections = f".neuroada_idx.{adapter}." in name or f".neuroada_delta.{adapter}." in name
        if not (connections or (param.requires_grad and ".neuroada_" not in name)):
            continue
        with sharding.whole(param) as value:
            if first:
                key = name.replace(f".modules_to_save.{adapter}", "")
                if ".neuroada_" in key:
                    key = NeuroAdaModel._remove_adapter_name_from_key(key, adapter)
                key = key.replace(f".{adapter}", "")
                dtype = torch.float32 if f".neuroada_delta.{adapter}." in name else value.dtype
                tensors[key] = value.detach().to("cpu", dtype, copy=True).contiguous()
    if first:
        if complete is not None:
            complete(tensors)
        if layers:
            cast(NeuroAdaConfig, config).saved_sha256 = sha256_of(tensors, adapter)
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"})
        inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = inference
