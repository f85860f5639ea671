"""Phase 3 on files: an adapter merged into its base checkpoint, and taken out again."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import TaskType

from neuroada.adapter.adapter_file import AdapterFile, read_adapter, read_config
from neuroada.adapter.config import NeuroAdaType
from neuroada.adapter.fingerprint import checksum, quantisation_in
from neuroada.errors import UserError
from neuroada.files import StoredTensor, check_inside, load_tensors, new_folder, save_tensors
from neuroada.files.names import match
from neuroada.hf.model_folder import FLOATS, check_model_folder
from neuroada.hf.tensor_files import DTYPES, Checkpoint
from neuroada.offline.entries import Entries, ExpertEntries, Whole
from neuroada.offline.expert_edits import expert_edits
from neuroada.offline.merge_quantised import Into, merge_quantised
from neuroada.offline.module_weights import merge_whole, verify_logits
from neuroada.offline.output import companions, copy_companions
from neuroada.offline.rewrite import rewrite
from neuroada.ops import adapted, unpack_indices

# Kept in a folder of its own: some servers load every *.safetensors that lies beside a model's.
KEPT = Path("unmerge") / "neuroada_base.safetensors"


def merge(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    keep_base: bool = True,
    verify: bool = False,
    progress: bool = False,
    into: Into = "dequantised",
) -> dict[str, Any]:
    """Write the merged model to `out`, an ordinary Hugging Face folder in the base's dtype; returns what was done.

    An adapter of a quantised base: see `merge_quantised`, which `into` is for.

    The same bits as PEFT's merge_and_unload. Memory: the adapter, the base values under its connections (kept in
    `KEPT` for `unmerge`, if `keep_base`) and one block of the checkpoint. `out` appears only when everything was
    written, its base_fingerprint agreed and, if `verify`, its logits were the adapter's. Adapters of other methods, of
    classifiers, whose head the base's files may lack, and of GPT-2's transposed weights are merged by PEFT, which loads
    the whole model.
    """
    started = time.monotonic()
    check_model_folder(base, "--base-model ")
    source = Checkpoint(base, "--base-model ")
    config = read_config(adapter)
    ours = config.peft_type == NeuroAdaType.NEUROADA and config.task_type != TaskType.SEQ_CLS
    if not ours or source.has_conv1d:
        _check_into(into, adapter)
        with new_folder(out, size=2 * source.size, field="--out ") as folder:
            copy_companions(base, folder)
            merge_whole(adapter, base, folder)
            if verify:
                verify_logits(adapter, base, folder)
        return _report(out, started, method=config.peft_type, verified=verify)

    contents = read_adapter(adapter)
    if (quantisation := quantisation_in(contents.config.base_fingerprint)) is not None:
        done = merge_quantised(contents, quantisation, base, out, into=into, verify=verify, progress=progress)
        return _report(out, started, method="NEUROADA", **done)
    _check_into(into, adapter)
    edits: dict[str, Entries | ExpertEntries | Whole] = {}
    parts: dict[str, dict[str, Entries | ExpertEntries]] = {}
    for module in contents.connections:
        parts[module] = _parts(contents, source, module)
        edits |= {_tensor(name, edit, source): edit for name, edit in parts[module].items()}
    for name, value in contents.whole.items():
        target = _target(contents, source, name, tuple(value.shape))
        _check_untied(contents, source, target)
        edits[target.name] = Whole(value)
    kept_size = sum(
        source.tensors[name].size if isinstance(edit, Whole) else 4 * edit.idx.nbytes for name, edit in edits.items()
    )
    size = source.size + sum(path.stat().st_size for path in companions(base)) + (kept_size if keep_base else 0)

    with new_folder(out, size=size, field="--out ") as folder:
        copy_companions(base, folder)
        _, written = rewrite(source, folder, edits, progress)
        found = checksum((module, *_whole(parts[module])) for module in sorted(parts))
        expected = contents.config.base_fingerprint
        if expected not in (None, found):
            raise UserError(
                f"--adapter {adapter}: was trained on other base weights than {base} (base_fingerprint {expected}, "
                f"here {found}); give the folder it was trained on as --base-model"
            )
        if keep_base:
            _keep(folder, contents, parts, edits, found, written)
        if verify:
            verify_logits(adapter, base, folder)
    connections = sum(delta.numel() for _, delta in contents.connections.values())
    return _report(
        out,
        started,
        method="NEUROADA",
        layers=len(parts),
        connections=connections,
        bytes=source.size,
        base_fingerprint="same" if expected else "not recorded in the adapter",
        verified=verify,
    )


def _check_into(into: Into, adapter: Path) -> None:
    if into == "quantised":
        raise UserError(f"--into quantised: {adapter} was trained over an unquantised base; leave --into out")


def base_of(adapter: Path) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the base model that an adapter names."""
    config = read_config(adapter)
    if not config.base_model_name_or_path:
        raise UserError(f"{adapter / 'adapter_config.json'}: base_model_name_or_path is empty; give --base-model")
    return config.base_model_name_or_path, config.revision


def unmerge(model: Path, out: Path, *, progress: bool = False) -> dict[str, Any]:
    """Write the base of a merged folder to `out`: its weight files to the byte, from the values kept in `KEPT`."""
    started = time.monotonic()
    check_model_folder(model, "--model ")
    source = Checkpoint(model)
    if not (model / KEPT).exists():
        raise UserError(f"--model {model}: has no {KEPT} (merged with --no-keep-base?); use the base model itself")
    kept, metadata = _read_kept(model)
    edits: dict[str, Entries | ExpertEntries | Whole] = {}
    merged: dict[str, Entries | ExpertEntries] = {}
    columns = metadata.get("transposed", "").split("\n")
    for key, value in kept.items():
        name, _, kind = key.rpartition(".")
        if kind == "neuroada_base":
            continue
        base = kept.get(f"{name}.neuroada_base")
        of_experts = kind == "neuroada_idx" and value.ndim == 3
        target: str | None = name
        if kind == "neuroada_idx":
            target = match(name if of_experts else f"{name}.weight", source.tensors)
        stored = source.tensors.get(target or "")
        if stored is None or not _fits(kind, value, base, stored, name in columns):
            raise UserError(f"--model {model}: {KEPT} does not fit its weights at {name}; merge again from the base")
        if kind == "neuroada_idx":
            experts = ExpertEntries(value, base=base, transposed=name in columns) if of_experts else None
            edits[stored.name] = merged[name] = experts or Entries(value, base=base)
        elif kind == "whole":
            edits[name] = Whole(value)
    size = source.size + sum(path.stat().st_size for path in companions(model))
    with new_folder(out, size=size, field="--out ") as folder:
        copy_companions(model, folder)
        read, _ = rewrite(source, folder, edits, progress)
        found = checksum((name, merged[name].idx, merged[name].replaced) for name in sorted(merged))
        files = metadata.get("files")
        if found != metadata.get("merged_fingerprint") or files not in (None, json.dumps(read, sort_keys=True)):
            raise UserError(f"--model {model}: its weights were changed after the merge; use the base model itself")
    return _report(
        out,
        started,
        layers=len(merged),
        bytes=source.size,
        base_fingerprint=metadata.get("base_fingerprint", "not recorded"),
    )


def _report(out: Path, started: float, **done: Any) -> dict[str, Any]:
    return {"out": str(out), **done, "seconds": round(time.monotonic() - started, 2)}


def _read_kept(model: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `_keep` wrote. UserError: damaged, or changed since."""
    path = model / KEPT
    check_inside(model, path)
    kept, metadata = load_tensors(path, "merge again from the base")
    if metadata.get("sha256") not in (None, _sha256(kept)):
        raise UserError(f"{path}: was changed after the merge (its sha256 differs); use the base model itself")
    return kept, metadata


def _sha256(kept: Mapping[str, torch.Tensor]) -> str:
    """Of everything in `KEPT` but its metadata."""
    digest = hashlib.sha256()
    for name in sorted(kept):
        digest.update(f"{name} {kept[name].dtype} {list(kept[name].shape)}\n".encode())
        digest.update(kept[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fits(kind: str, value: torch.Tensor, base: torch.Tensor | None, stored: StoredTensor, columns: bool) -> bool:
    """Whether a tensor of `KEPT` (with the base values beside it) belongs to this weight. columns: whether the neurons
    of experts are their matrices' columns."""
    if kind == "whole":
        return tuple(torch.atleast_1d(value).shape) == (stored.shape or (1,)) and value.is_floating_point()
    if kind != "neuroada_idx" or base is None or len(stored.shape) not in (2, 3) or stored.dtype not in FLOATS:
        return False
    *neurons, inputs = stored.shape
    if columns and len(neurons) == 2:
        neurons[1], inputs = inputs, neurons[1]
    paired = value.dtype == torch.uint8 and tuple(value.shape[:-1]) == tuple(neurons) and value.shape[-1] % 2 == 0
    whole = paired and tuple(base.shape) == (*neurons, value.shape[-1] // 2) and value.numel() > 0
    return whole and base.dtype == DTYPES[stored.dtype] and int(unpack_indices(value).max()) < inputs


def _target(adapter: AdapterFile, source: Checkpoint, name: str, shape: tuple[int | None, ...]) -> StoredTensor:
    """The base's tensor for an adapter's, of this shape (None: any) and floating point."""
    found = match(name, source.tensors)
    where = f"--adapter {adapter.folder} does not fit {source.folder}"
    if found is None:
        raise UserError(f"{where}: no tensor {name} there; give the adapter's own base as --base-model")
    tensor = source.tensors[found]
    if len(tensor.shape) != len(shape) or any(w not in (None, s) for w, s in zip(shape, tensor.shape, strict=True)):
        raise UserError(f"{where}: {found} is {list(tensor.shape)} there, the adapter's has {shape[0]} rows")
    if tensor.dtype not in FLOATS:
        raise UserError(f"{where}: {found} is {tensor.dtype}, not one of {', '.join(FLOATS)}; give it unquantised")
    return tensor


def _parts(adapter: AdapterFile, source: Checkpoint, module: str) -> dict[str, Entries | ExpertEntries]:
    """Module, or tensor of experts -> its edit, in the order of the module's neurons."""
    idx, delta = adapter.connections[module]
    told = f"--adapter {adapter.folder} does not fit {source.folder}"
    found: dict[str, Entries | ExpertEntries] = {module: Entries(idx, delta=delta)}
    if idx.ndim == 3:
        found = expert_edits(module, idx, delta, source, told)
    for name, edit in found.items():
        inputs, shape = -1, tuple[int | None, ...]((len(edit.idx), None))
        if isinstance(edit, ExpertEntries):
            shape = (*edit.idx.shape[:2], None)
            if edit.transposed:
                inputs, shape = 1, (len(edit.idx), None, edit.idx.shape[1])
        target = _target(adapter, source, _tensor(name, edit, source), shape)
        if (highest := int(unpack_indices(edit.idx).max())) >= target.shape[inputs]:
            raise UserError(
                f"--adapter {adapter.folder}: {name} has connection {highest}, its weight only {target.shape[inputs]} "
                f"columns"
            )
    return found


def _tensor(name: str, edit: Entries | ExpertEntries, source: Checkpoint) -> str:
    """The tensor in the files that a part of `_parts` edits."""
    wanted = name if isinstance(edit, ExpertEntries) else f"{name}.weight"
    return match(wanted, source.tensors) or wanted


def _whole(parts: Mapping[str, Entries | ExpertEntries]) -> tuple[torch.Tensor, torch.Tensor]:
    """idx and replaced values of a module's neurons in order, once all passed: what its fingerprint is of."""
    edits = parts.values()
    return torch.cat([edit.idx.flatten(0, -2) for edit in edits]), torch.cat(
        [edit.replaced.flatten(0, -2) for edit in edits]
    )


def _check_untied(adapter: AdapterFile, source: Checkpoint, target: StoredTensor) -> None:
    """An embedding stored once and used twice cannot be replaced in one of its places."""
    vocabulary = source.config.get("vocab_size")
    tables = [t for t in source.tensors.values() if len(t.shape) == 2 and t.shape[0] == vocabulary]
    if tables == [target]:
        raise UserError(
            f"--adapter {adapter.folder}: modules_to_save replaces {target.name}, which the base uses as input and "
            "output embedding; untie them (tie_word_embeddings = false) before training"
        )


def _keep(
    folder: Path,
    contents: AdapterFile,
    parts: dict[str, dict[str, Entries | ExpertEntries]],
    edits: Mapping[str, Entries | ExpertEntries | Whole],
    base_fingerprint: str,
    files: dict[str, str],
) -> None:
    """Write `KEPT`: what `unmerge` needs, and checksums of the base and of the merged values under the connections."""
    kept: dict[str, torch.Tensor] = {}
    changed = {name: edit for part in parts.values() for name, edit in part.items()}
    for name, edit in changed.items():
        kept |= {f"{name}.neuroada_idx": edit.idx.clone(), f"{name}.neuroada_base": edit.replaced}
    kept |= {f"{name}.whole": edit.replaced for name, edit in edits.items() if isinstance(edit, Whole)}
    values = ((name, edit.idx, _merged(edit)) for name, edit in sorted(changed.items()))
    columns = [name for name, edit in changed.items() if isinstance(edit, ExpertEntries) and edit.transposed]
    metadata = {
        "format": "pt",
        "base_model": str(contents.config.base_model_name_or_path),
        "base_fingerprint": base_fingerprint,
        "merged_fingerprint": checksum(values),
        "files": json.dumps(files, sort_keys=True),
        "sha256": _sha256(kept),
        **({"transposed": "\n".join(columns)} if columns else {}),
    }
    save_tensors(folder / KEPT, kept, metadata)


def _merged(edit: Entries | ExpertEntries) -> torch.Tensor:
    """The values under the connections after the merge."""
    assert edit.delta is not None
    return adapted(edit.replaced, edit.delta)
