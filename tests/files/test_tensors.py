"""Safetensors files that are not what their names say, and folders whose index points elsewhere."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neuroada.errors import UserError
from neuroada.files import load_tensors, open_tensors, read_header, weight_files


def told(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.fixture
def whole(tmp_path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.arange(6).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0)}, path,
              {"k": "1"})  # fmt: skip
    return path


def with_header(path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_whole_file(whole):
    tensors, metadata = read_header(whole)
    assert {t.name: (t.dtype, t.shape) for t in tensors} == {
        "b": ("I64", (2, 3)),
        "a": ("BF16", (3,)),
        "none": ("F32", (0,)),
    }
    assert metadata == {"k": "1"} and load_tensors(whole)[1] == {"k": "1"}
    with open_tensors(whole) as opened:
        assert opened.get_tensor("b").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_every_cut_and_every_flipped_byte_of_the_header_is_told_or_harmless(whole):
    content = whole.read_bytes()
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        told(read_header, whole)
    whole.write_bytes(content + b"x")
    assert "not a whole safetensors file" in told(read_header, whole)
    header = int.from_bytes(content[:8], "little") + 8
    for place in range(header):
        for flip in (1, 0x20, 0x80):
            changed = bytearray(content)
            changed[place] ^= flip
            whole.write_bytes(bytes(changed))
            try:
                load_tensors(whole)  # a name may differ: the names are checked where they are known
            except UserError as error:
                assert str(error).startswith(str(whole))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([], "no JSON object"),
        (b"[" * 50_000, "nested deeper"),
        (b"\xff" * 20, "no JSON object"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        ({"a": 1}, "unknown dtype"),
        ({"a": {"dtype": "F5", "shape": [1], "data_offsets": [0, 16]}}, "unknown dtype 'F5'"),
        ({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "no proper shape"),
        ({"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}}, "no proper shape"),
        ({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, "no proper shape"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, "no proper shape"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, "which are not F32 [5]"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}, "which are not F32"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}}, "begins at byte"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "not a whole safetensors file"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "not a whole safetensors file"),
        ({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, "begins at byte"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, said):
    assert said in told(read_header, with_header(tmp_path / "a.safetensors", header))


def test_other_formats_under_the_name_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    assert "a pickle of torch.save" in told(load_tensors, path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "a pickle" in told(load_tensors, path)
    for content, said in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\xff" * 100, "its header would have 18,446,744,073,709,551,615"),
    ):
        path.write_bytes(content)
        assert said in told(load_tensors, path)
    with path.open("wb") as file:  # a sparse file whose header would take 2 GB of memory
        file.write((2_000_000_000).to_bytes(8, "little"))
        file.truncate(2_100_000_000)
    assert "more than 100,000,000" in told(load_tensors, path)
    path.unlink()
    os.mkfifo(path)
    assert "pipe" in told(load_tensors, path)
    assert "no such file" in told(load_tensors, tmp_path / "absent")
    assert "is a folder" in told(load_tensors, tmp_path)


def model(folder: Path, weight_map: object = None) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_weights_of_a_folder(tmp_path):
    found = weight_files(model(tmp_path / "sharded"))
    assert {name: tensor.file.name for name, tensor in found.items()} == {"a": "1.safetensors", "b": "2.safetensors"}
    save_file({"c": torch.ones(2)}, tmp_path / "sharded" / "model.safetensors")
    assert set(weight_files(tmp_path / "sharded")) == {"c"}  # as transformers prefers it


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../1.safetensors"}, {"a": "/etc/passwd"}, {"a": "x/../1.safetensors"}, {"a": "."},
        {"a": "3.safetensors"},
        {"a": None}, {"a": ["1.safetensors"]}, {"a": "2.safetensors"}, {"a": "link.safetensors"}, {"a": ""},
        {"a": ".."}, {}, [], "x", 1,
    ],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(tmp_path, weight_map):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    folder = model(tmp_path / "model", weight_map)
    (folder / "link.safetensors").symlink_to(tmp_path / "1.safetensors")
    assert str(folder) in told(weight_files, folder)


def test_a_folder_without_safetensors(tmp_path):
    assert "neither model.safetensors nor" in told(weight_files, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "only pickled weights" in told(weight_files, tmp_path)
    (tmp_path / "model.safetensors").symlink_to("/etc/passwd")
    assert "outside its folder" in told(weight_files, tmp_path)
