"""What is refused before or while merging and selecting: one line, and nothing left behind."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from streaming_models import save_adapter, save_base

from neuroada.errors import UserError
from neuroada.files import StoredTensor, atomic, load_tensors
from neuroada.hf.tensor_files import blocks, resolve
from neuroada.offline import rewrite
from neuroada.offline.merge import KEPT, merge, unmerge
from neuroada.offline.select import select

ADAPTER_FILE = "adapter_model.safetensors"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    save_adapter(save_base(folder / "base"), folder / "adapter")
    return folder


@pytest.fixture
def room(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(room: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as raised:
        merge(room / "adapter", room / "base", room / "merged")
    assert "\n" not in str(raised.value)
    assert not any(path.name.startswith((".", "merged")) for path in room.iterdir())


def shard_of(base: Path, tensor: str) -> Path:
    return base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors, metadata = load_tensors(file)
    tensors = {name: value.clone() for name, value in tensors.items()}
    edit(tensors)
    save_file(tensors, file, metadata)


def forget_checksum(room: Path) -> None:
    config = room / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "connections_sha256": None}))


def test_missing_shard(room: Path) -> None:
    shard_of(room / "base", f"{DOWN}.weight").unlink()
    refused(room, "which is not there")


def test_shard_cut_off(room: Path) -> None:
    shard = shard_of(room / "base", f"{DOWN}.weight")
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(room, "not a whole safetensors file")


def test_wrong_index(room: Path) -> None:
    index = room / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][f"{DOWN}.weight"] = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    refused(room, "does not hold it")
    content["weight_map"][f"{DOWN}.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    refused(room, "is no name of a file in this folder")
    index.write_text("[]")
    refused(room, "has no weight_map")
    index.unlink()
    refused(room, "neither")


def test_unexpected_shape(room: Path) -> None:
    change(shard_of(room / "base", f"{DOWN}.weight"), lambda t: t.update({f"{DOWN}.weight": torch.zeros(50, 80)}))
    refused(room, r"down_proj.weight is \[50, 80\] there")


def test_unexpected_dtype(room: Path) -> None:
    quantised = torch.zeros(48, 80, dtype=torch.int8)
    change(shard_of(room / "base", f"{DOWN}.weight"), lambda t: t.update({f"{DOWN}.weight": quantised}))
    refused(room, "is I8, not one of")
    with pytest.raises(UserError, match="is I8, not one of"):
        select(room / "base", 3, room / "s.safetensors")


def test_other_weights(room: Path) -> None:
    change(shard_of(room / "base", f"{DOWN}.weight"), lambda t: t[f"{DOWN}.weight"].mul_(1.1))
    refused(room, "trained on other base weights")
    config = json.loads((room / "adapter" / "adapter_config.json").read_text())
    (room / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_fingerprint": None}))
    assert "not recorded" in merge(room / "adapter", room / "base", room / "merged")["base_fingerprint"]


def test_not_finite_base(room: Path) -> None:
    change(shard_of(room / "base", f"{DOWN}.weight"), lambda t: t[f"{DOWN}.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        select(room / "base", 3, room / "s.safetensors", workers=2)
    assert not (room / "s.safetensors").exists()


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda t, idx, delta: t.update({"base_model.model.none.neuroada_idx": t[idx].clone()}), "no deltas"),
        (lambda t, idx, delta: t.pop(delta), "no deltas"),
        (lambda t, idx, delta: t.update({delta: t[delta][:, :2].contiguous()}), "has deltas .* expected"),
        (lambda t, idx, delta: t[idx][:, 1::2].fill_(0xFF), "connection 65[0-9]*, its weight only 80 columns"),
        (lambda t, idx, delta: t[delta].fill_(float("inf")), "NaN or infinity"),
        (lambda t, idx, delta: t.update({"base_model.model.head.weight": t[delta].clone()}), "no tensor head.weight"),
        (lambda t, idx, delta: t.update({"head.weight": t[delta].clone()}), "does not begin with"),
        (lambda t, idx, delta: t.clear(), "holds no connections"),
    ],
)
def test_damaged_adapter(room: Path, edit: Callable[..., object], pattern: str) -> None:
    names = [f"base_model.model.{DOWN}.neuroada_{kind}" for kind in ("idx", "delta")]
    change(room / "adapter" / ADAPTER_FILE, lambda tensors: edit(tensors, *names))
    forget_checksum(room)
    refused(room, pattern)


def test_adapter_of_modules_the_base_lacks(room: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("layers.1", "layers.9")] = tensors.pop(name)

    change(room / "adapter" / ADAPTER_FILE, rename)
    refused(room, "connections_sha256 differs")
    forget_checksum(room)
    refused(room, "no tensor model.layers.9")


def test_adapter_without_its_file(room: Path) -> None:
    (room / "adapter" / ADAPTER_FILE).unlink()
    refused(room, "no such file")
    (room / "adapter" / "adapter_config.json").write_text("{}")
    refused(room, "peft_type: missing")


def test_tied_embedding_saved_whole(tmp_path: Path) -> None:
    save_adapter(save_base(tmp_path / "base", tied=True), tmp_path / "adapter")
    embedding = {"base_model.model.model.embed_tokens.weight": torch.zeros(128, 48)}
    change(tmp_path / "adapter" / ADAPTER_FILE, lambda tensors: tensors.update(embedding))
    refused(tmp_path, "untie them")


def test_no_space(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    refused(room, "choose another disk")


def test_interrupted_leaves_nothing_that_looks_whole(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of killed runs: tests/files/test_atomic.py."""
    written = []

    def interrupt(tensor: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
        written.append(tensor)
        if len(written) == 9:
            assert list(room.glob(".merged.*.partial")) and not (room / "merged").exists()
            raise KeyboardInterrupt
        yield from blocks(tensor)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(rewrite, "blocks", interrupt)
        merge(room / "adapter", room / "base", room / "merged")
    assert sorted(path.name for path in room.iterdir()) == ["adapter", "base"]
    merge(room / "adapter", room / "base", room / "merged")
    assert sorted(path.name for path in room.iterdir()) == ["adapter", "base", "merged"]


def test_what_is_there_stays(room: Path) -> None:
    (room / "merged").mkdir()
    (room / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        merge(room / "adapter", room / "base", room / "merged")
    assert [path.name for path in (room / "merged").iterdir()] == ["mine.txt"]
    (room / "merged" / "mine.txt").unlink()
    merge(room / "adapter", room / "base", room / "merged")  # an empty folder may be filled


def test_unmerge_of_changed_weights(room: Path) -> None:
    merge(room / "adapter", room / "base", room / "merged")
    change(shard_of(room / "merged", f"{DOWN}.weight"), lambda t: t[f"{DOWN}.weight"].mul_(1.1))
    with pytest.raises(UserError, match="changed after the merge"):
        unmerge(room / "merged", room / "back")
    assert not (room / "back").exists()


def test_unmerge_of_weights_changed_anywhere(room: Path) -> None:
    merge(room / "adapter", room / "base", room / "merged")
    change(shard_of(room / "merged", "model.norm.weight"), lambda t: t["model.norm.weight"].mul_(1.1))
    with pytest.raises(UserError, match="changed after the merge"):
        unmerge(room / "merged", room / "back")


def test_unmerge_of_changed_base_values(room: Path) -> None:
    merge(room / "adapter", room / "base", room / "merged")
    change(room / "merged" / KEPT, lambda t: t[f"{DOWN}.neuroada_base"].mul_(1.1))
    with pytest.raises(UserError, match="changed after the merge"):
        unmerge(room / "merged", room / "back")


def test_links_out_of_the_base_are_not_copied(room: Path) -> None:
    (room / "secret").write_text("secret")
    (room / "base" / "notes.txt").symlink_to(room / "secret")
    refused(room, "outside its folder")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(room: Path, value: float) -> None:
    change(shard_of(room / "base", "model.norm.weight"), lambda t: t["model.norm.weight"].fill_(value))
    refused(room, "model.norm.weight holds NaN or infinity")


def test_no_such_model() -> None:
    with pytest.raises(UserError, match="no such folder"):
        resolve("./nowhere", "--model")
