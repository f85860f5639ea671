"""An adapter written as one of PEFT's SHiRA, which PEFT loads without this package."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import ShiraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from neuroada.adapter.adapter_file import read_config
from neuroada.errors import UserError
from neuroada.files import load_tensors, new_folder, save_tensors
from neuroada.ops import unpack_indices

PREFIX = "base_model.model."
KINDS = (".neuroada_idx", ".neuroada_delta")


def export_shira(adapter: Path, out: Path, in_features: Mapping[str, int]) -> int:
    """Write `out` from the adapter's folder; `in_features` of each module it adapts. -> SHiRA's r.

    SHiRA adds a sparse matrix of r x (in + out) entries to each weight: the smallest r that holds all connections is
    taken, and filled up with zeros. Equal outputs in fp32; in bf16 PEFT adds before it rounds as well.
    """
    tensors, _ = load_tensors(adapter / SAFETENSORS_WEIGHTS_NAME)
    config = read_config(adapter)
    modules = sorted(key.removesuffix(KINDS[0]) for key in tensors if key.endswith(KINDS[0]))
    if not modules:
        raise UserError(f"{adapter}: holds no connections of NeuroAda; nothing to export")
    names = {module: module.removeprefix(PREFIX) for module in modules}
    if absent := [name for name in names.values() if name not in in_features]:
        raise UserError(f"{adapter}: adapts {absent[0]}, which the base model lacks; give the base it was trained on")
    sizes = {module: len(tensors[module + KINDS[1]]) + in_features[names[module]] for module in modules}
    r = max(-(-tensors[module + KINDS[1]].numel() // sizes[module]) for module in modules)
    exported = {key: value for key, value in tensors.items() if not key.endswith(KINDS)}
    for module in modules:
        idx, delta = unpack_indices(tensors[module + KINDS[0]]), tensors[module + KINDS[1]].float()
        rows = torch.arange(len(idx))[:, None].expand_as(idx)
        entries = torch.stack([rows.flatten(), idx.flatten()]).int()
        missing = r * sizes[module] - delta.numel()
        exported[f"{module}.shira_indices"] = torch.nn.functional.pad(entries, (0, missing))
        exported[f"{module}.shira_weight"] = torch.nn.functional.pad(delta.flatten(), (0, missing))
    shira = ShiraConfig(
        r=r,
        target_modules=sorted(names.values()),
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    with new_folder(out) as folder:
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, exported, {"format": "pt"})
        shira.save_pretrained(str(folder))
    return r
