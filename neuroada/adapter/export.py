"""An adapter written as one of PEFT's SHiRA, which PEFT loads without this package."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import ShiraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from neuroada.adapter.adapter_file import PREFIX, read_adapter
from neuroada.adapter.fingerprint import quantisation_in
from neuroada.errors import UserError
from neuroada.files import new_folder, save_tensors
from neuroada.ops import unpack_indices


def export_shira(adapter: Path, out: Path, in_features: Mapping[str, int]) -> int:
    """Write `out` from the adapter's folder; `in_features` of each module it adapts. -> SHiRA's r.

    SHiRA adds a sparse matrix of r x (in + out) entries to each weight: the smallest r that holds all connections is
    taken, and filled up with zeros. Equal outputs in fp32; in bf16 PEFT adds before it rounds as well. UserError as of
    `read_adapter`; experts; a quantised base's adapter; a module that the base lacks.
    """
    found = read_adapter(adapter)
    if (quantisation := quantisation_in(found.config.base_fingerprint)) is not None:
        raise UserError(
            f"{adapter}: was trained over a quantised base ({quantisation.describe()}), and SHiRA adds to the "
            f"original, which makes another model; use `neuroada merge`"
        )
    exported = {f"{PREFIX}{name}": value for name, value in found.whole.items()}
    sizes: dict[str, int] = {}
    for module, (_, delta) in found.connections.items():
        if delta.dim() > 2:
            raise UserError(
                f"{adapter}: adapts experts, {module} among them, which SHiRA does not; use `neuroada merge`"
            )
        if module not in in_features:
            raise UserError(f"{adapter}: adapts {module}, which the base model lacks; give the base it was trained on")
        sizes[module] = len(delta) + in_features[module]
    r = max(-(-delta.numel() // sizes[module]) for module, (_, delta) in found.connections.items())
    for module, (idx_bytes, delta) in found.connections.items():
        idx = unpack_indices(idx_bytes)
        rows = torch.arange(len(idx))[:, None].expand_as(idx)
        entries = torch.stack([rows.flatten(), idx.flatten()]).int()
        missing = r * sizes[module] - delta.numel()
        exported[f"{PREFIX}{module}.shira_indices"] = torch.nn.functional.pad(entries, (0, missing))
        exported[f"{PREFIX}{module}.shira_weight"] = torch.nn.functional.pad(delta.flatten(), (0, missing))
    shira = ShiraConfig(
        r=r,
        target_modules=sorted(found.connections),
        modules_to_save=found.config.modules_to_save,
        base_model_name_or_path=found.config.base_model_name_or_path,
        task_type=found.config.task_type,
        inference_mode=True,
    )
    with new_folder(out) as folder:
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, exported, {"format": "pt"})
        shira.save_pretrained(str(folder))
    return r
