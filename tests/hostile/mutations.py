"""Ways to damage a file, each a function of a seeded random generator: of bytes, of values, of tensors, of the file."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 0.5, 1e308, -1e308, 10**30, 2**63, 2**31, -(2**40), "", " ", "x", "x" * 5000,
    "1e-3", "nan", "../../etc/passwd", "/etc/passwd", "a\nb", "a\0b", "[red]x[/red]", "$(touch leaked)", "\x1b[31m",
    "é漢😀", [], {}, [[]], [None], {"a": 1}, {"": {}}, ["x"] * 50, float("inf"), float("-inf"),
]  # fmt: skip

RAW = [
    b"", b" ", b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xff\xfe", b"\0" * 64,
    b'{"a": 1, "a": 2}', b'{"a": NaN}', b'["\\ud800"]', b"\x80\x04K\x01.", b"PK\x03\x04", b"<html>", b"- a\n- b",
    b"version https://git-lfs.github.com/spec/v1\n", b"&a [*a]", b"a: !!python/object/apply:os.system ['touch leaked']",
]  # fmt: skip


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Cut, flip, insert, delete, repeat or replace bytes."""
    content = path.read_bytes()
    kind = rng.choice(["cut", "flip", "insert", "delete", "repeat", "replace", "append"])
    at = rng.randrange(len(content) + 1)
    # headers and first keys matter most
    at = min(at, rng.randrange(200)) if rng.random() < 0.5 else at
    if kind == "cut":
        changed = content[:at]
    elif kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 8])):
            place = rng.randrange(len(changed)) if changed else 0
            if changed:
                changed[place] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        changed = (
            content[:at] + rng.choice([b"\0", b"\xff", b'"', b"{", b",", b"\n", b"9" * 30, b"[red]"]) + content[at:]
        )
    elif kind == "delete":
        changed = content[:at] + content[at + rng.choice([1, 2, 16]) :]
    elif kind == "repeat":
        changed = content + content
    elif kind == "append":
        changed = content + rng.choice([b"x", b"\n", b"\0" * 8, b"{}"])
    else:
        changed = rng.choice(RAW)
    path.write_bytes(bytes(changed))
    return f"{kind} bytes at {at}"


def damage_value(path: Path, rng: random.Random) -> str:
    """Replace, remove, rename or double one value of a JSON, JSON-lines or YAML file."""
    text = path.read_text()
    lines = path.suffix == ".jsonl"
    value = [json.loads(line) for line in text.splitlines()] if lines else None
    value = value if lines else yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    places = list(_places(value))
    if not places:
        return damage_bytes(path, rng)
    holder, key = rng.choice(places)
    kind = rng.choice(["replace", "replace", "replace", "remove", "rename"])
    odd = rng.choice(ODD)
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(["x", "", str(key).upper(), f"{key} "])] = holder.pop(key)
    else:
        holder[key] = odd
    if lines:
        path.write_text("".join(json.dumps(one) + "\n" for one in value))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(value, sort_keys=False))
    else:
        path.write_text(json.dumps(value))
    return f"{kind} {key!r} by {str(odd)[:30]!r}"


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def damage_tensors(path: Path, rng: random.Random) -> str:
    """Remove, rename, cast, cut, poison or exchange tensors of a safetensors file that stays well-formed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    names = sorted(tensors)
    kind = rng.choice(["remove", "rename", "cast", "cut", "poison", "flip", "swap", "extra", "empty", "pickle", "zero"])
    name = rng.choice(names)
    old = tensors[name]
    if kind == "remove":
        for one in rng.sample(names, rng.choice([1, min(2, len(names)), len(names)])):
            del tensors[one]
    elif kind == "rename":
        tensors[rng.choice([f"{name}x", name[::-1], f"x.{name}", name.upper()])] = tensors.pop(name)
    elif kind == "cast":
        dtypes = [torch.int8, torch.int32, torch.float16, torch.float64, torch.bfloat16, torch.bool]
        dtype = rng.choice([dtype for dtype in dtypes if dtype != old.dtype])
        tensors[name] = old.to(dtype)
    elif kind == "cut":
        tensors[name] = old[: max(0, old.shape[0] - rng.choice([1, old.shape[0]]))].clone()
    elif kind == "poison" and old.is_floating_point():
        old.view(-1)[rng.randrange(old.numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])
    elif kind == "swap":
        other = rng.choice(names)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "extra":
        tensors["model.extra.weight"] = torch.ones(3, 3)
    elif kind == "empty":
        tensors[name] = torch.empty(0)
    elif kind == "pickle":
        torch.save(tensors, path)
        return "a pickle"
    elif kind == "zero":
        tensors[name] = torch.zeros_like(old)
    else:
        kind = "flip"
        flat = old.view(-1).view(torch.uint8)
        flat[rng.randrange(flat.numel())] ^= 1 << rng.randrange(8)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    return f"{kind} {name}"


def damage_header(path: Path, rng: random.Random) -> str:
    """One odd value in a safetensors file's header, whose length is put right."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    holder, key = rng.choice(list(_places(header)))
    odd = rng.choice([*ODD, 2**40, 2**62, "F64", "F8_E4M3", "I8", "U8", "F4", [0, 2**50], [-1, 4]])
    holder[key] = odd
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"header {key!r} by {str(odd)[:30]!r}"


def damage_file(path: Path, rng: random.Random) -> str:
    """Another thing where the file was: nothing, a folder, a link, a pipe, a device."""
    kind = rng.choice(["nothing", "folder", "dead link", "loop", "secret link", "pipe", "device", "other"])
    outside = path.parents[1] / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("SECRET")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dead link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "secret link":
        path.symlink_to(outside / "secret")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "other":
        others = [other for other in path.parent.iterdir() if other.is_file()]
        if others:
            shutil.copyfile(rng.choice(sorted(others)), path)
    return kind


Damage = Callable[[Path, random.Random], str]


def ways(path: Path) -> list[Damage]:
    """The ways that fit a file, each as often as it is worth."""
    if path.suffix == ".safetensors":
        return [damage_bytes, damage_tensors, damage_tensors, damage_header, damage_file]
    return [damage_bytes, damage_value, damage_value, damage_value, damage_file]
