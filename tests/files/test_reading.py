"""What is read is bounded and strict, and every mistake is one line with the file, the place and the remedy."""

import os
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from neuroada.errors import UserError
from neuroada.files import (
    check_inside,
    check_schema,
    member,
    parse_yaml,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def told(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ('{"a": 1', "not JSON at line 1, column 8"),
        ('{"a": 1}\nx', "not JSON at line 2"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice"),
        ("[" * 100_000, "nested deeper than 60"),
        ("[" * 200 + "]" * 200, "nested deeper than 60"),
        ('{"a":' * 100_000, "nested deeper than 60"),
        ("9" * 10_000, "beyond 64 bits"),
        ("[-9223372036854775809]", "beyond 64 bits"),
        ("[NaN]", "NaN"),
        ('["\\ud800"]', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b"\x00\x01", "not JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, content, said):
    path = write(tmp_path / "a.json", content)
    message = told(read_json, path, remedy="write it again")
    assert message.startswith(str(path)) and said in message and message.endswith("; write it again")


def test_json_that_is_read(tmp_path):
    text = '\ufeff{"a": [1, -2.5e-3, true, null, 9223372036854775807, Infinity], "\U0001f600": "\\ud83d\\ude00"}'
    value = read_json(write(tmp_path / "a.json", text))
    assert value == {"a": [1, -0.0025, True, None, 2**63 - 1, float("inf")], "\U0001f600": "\U0001f600"}


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "file", "")
    assert "pipe or a device" in told(read_text, tmp_path / "pipe")  # and does not wait for a writer
    assert "pipe or a device" in told(read_text, Path("/dev/zero"))
    assert "is a folder" in told(read_json, tmp_path)
    assert "no such file" in told(read_json, tmp_path / "nothing")
    assert "no such file" in told(read_json, tmp_path / "dead")
    assert "circle" in told(read_json, tmp_path / "loop")
    assert "not a folder" in told(read_json, tmp_path / "file" / "x")
    assert "too long" in told(read_json, tmp_path / ("x" * 300))
    assert "NUL" in told(read_json, tmp_path / "a\0b")
    assert "larger than 3 bytes" in told(read_text, write(tmp_path / "large", "1234"), limit=3)
    if os.geteuid():
        write(tmp_path / "secret", "1").chmod(0)
        assert "permission denied" in told(read_json, tmp_path / "secret")


def test_a_folder_of_many_odd_files_leaves_no_file_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        told(read_json, tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n{"a"')
    assert read_json_lines(path, torn=True) == [{"a": 1}, {"a": 2}]
    assert f"{path}, line 3: not JSON" in told(read_json_lines, path)
    assert read_json_lines(write(path, '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert read_json_lines(write(path, '{"a": 1}')) == [{"a": 1}] and read_json_lines(write(path, "")) == []
    assert "line 1: is empty" in told(read_json_lines, write(path, '\n{"a": 1}'))


LAUGHS = "b0: &b0 [1]\n" + "".join(f"b{n}: &b{n} [{','.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [1", "not YAML at line 1"),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' stands twice"),
        ("a: {b: 1, b: 2}", "key 'b' stands twice"),
        ("1: a\n1.0: b", "stands twice"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: !!python/name:os.system ''", "could not determine a constructor"),
        ("[" * 5000, "nested deeper"),
        ("a: &a [*a]", "nested deeper"),
        (LAUGHS, "more than"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "merge keys"),
        ("a: " + "9" * 5000, "beyond 64 bits"),
        ("a: 0x" + "f" * 20, "beyond 64 bits"),
        ("a: 2026-99-99", "month"),
        ("? [1]\n: 2", "a key must be a plain value"),
        ('a: "\\ud800"', "surrogate"),
        ("a: \x07", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        (b"a: \xff", "not UTF-8"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(tmp_path, content, said):
    path = write(tmp_path / "a.yaml", content)
    message = told(read_yaml, path)
    assert message.startswith(str(path)) and said in message


def test_yaml_numbers_are_numbers():
    assert parse_yaml("[1e-3, 3.0e-3, 1E5, -2e+4, .5e1, 1, true, 0x1f, e3, 1e, 7e3x]", "x") == [
        1e-3, 3e-3, 1e5, -2e4, 5.0, 1, True, 31, "e3", "1e", "7e3x",
    ]  # fmt: skip
    assert parse_yaml("", "x") is None


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    k: Annotated[int, Field(ge=1, le=100)]
    lr: float = 0.1


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    part: Part
    names: list[str] = []


def test_every_error_of_a_schema_is_told_in_one_line():
    said = told(
        check_schema, Whole, {"part": {"k": True, "rl": 1}, "nmaes": [], "names": ["x\ny" * 50]}, "a.yaml", "see docs"
    )
    assert said == (
        "a.yaml: part.k = True: input should be a valid integer; part.rl: no such field; did you mean lr?; "
        "nmaes: no such field; did you mean names?; see docs"
    )
    assert "part: missing" in told(check_schema, Whole, {}, "a.yaml")
    assert "part.k = 0: input should be greater" in told(check_schema, Whole, {"part": {"k": 0}}, "a.yaml")
    assert "[1]: input should be a valid dictionary" in told(check_schema, Whole, [1], "a.yaml")
    many = told(check_schema, Whole, {"part": {"k": 1}, **{f"field{n}": n for n in range(99)}}, "a.yaml")
    assert "and 91 more" in many
    assert check_schema(Whole, {"part": {"k": 3}}, "a.yaml").part.k == 3


def test_names_in_a_file_stay_in_its_folder(tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    write(other if other.mkdir() else other / "x", "secret")
    (home / "out").symlink_to(other / "x")
    (home / "in").symlink_to("real")
    write(home / "real", "1")
    for name in (
        "../other/x",
        "/etc/passwd",
        "a/../../b",
        "",
        ".",
        "..",
        "sub/x",
        "a\0b",
        "..\\x",
        None,
        3,
        ["x"],
        "out",
    ):
        assert str(home) in told(member, home, name)
    assert member(home, "in").read_text() == "1" and not member(home, "absent").exists()


def test_links_of_a_hub_cache_are_followed_into_its_blobs_only(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "1", "whole")
    write(tmp_path / "secret", "secret")
    (snapshot / "good").symlink_to("../../blobs/1")
    (snapshot / "bad").symlink_to("../../../secret")
    assert member(snapshot, "good").read_text() == "whole"
    assert "outside its folder" in told(member, snapshot, "bad")
    (tmp_path / "linked").symlink_to(tmp_path / "models--a--b")
    assert member(tmp_path / "linked" / "snapshots" / "abc", "good").read_text() == "whole"


def test_links_in_a_circle(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("loop", "a"):
        check_inside(tmp_path, tmp_path / name)  # not out of it
        assert "links lead in a circle" in told(read_text, member(tmp_path, name))
