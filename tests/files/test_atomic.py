"""Files and folders that appear whole or not at all, whoever else writes or dies meanwhile."""

import errno
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from neuroada.errors import UserError
from neuroada.files import (
    load_tensors,
    new_folder,
    open_append,
    replacing,
    save_tensors,
    write_json,
    write_text,
    write_yaml,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o007, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_get_the_permissions_of_the_umask(tmp_path, umask):
    write_text(tmp_path / "a.txt", "über\n")
    write_json(tmp_path / "b.json", {"a": 1})
    write_yaml(tmp_path / "c.yaml", {"a": 1})
    save_tensors(tmp_path / "d.safetensors", {"x": torch.zeros(2)})
    with new_folder(tmp_path / "model") as folder:
        save_tensors(folder / "e.safetensors", {"x": torch.zeros(2)})
        torch.save([], folder / "f")
        (folder / "f").chmod(0o600)
    assert {permissions(path) for path in tmp_path.rglob("*") if path.is_file()} == {0o666 & ~umask}
    assert names(tmp_path) == ["a.txt", "b.json", "c.yaml", "d.safetensors", "model"]
    assert (tmp_path / "a.txt").read_bytes() == "über\n".encode()


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.txt", float("nan"))
    with pytest.raises(UserError, match="half a surrogate pair"):
        write_text(tmp_path / "a.txt", "\ud800")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_the_disks_errors_are_one_line_about_the_file_to_come(tmp_path, number):
    with pytest.raises(UserError) as error, replacing(tmp_path / "a.txt") as temporary:
        raise OSError(number, os.strerror(number), str(temporary))
    assert str(error.value).startswith(f"{tmp_path / 'a.txt'}: ") and "partial" not in str(error.value)
    assert error.value.__cause__.errno == number and not names(tmp_path)


def test_a_full_disk_under_safetensors_is_one_line(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.safetensors"):
            save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(10_000)})
        with pytest.raises(UserError, match=r"a\.txt: larger than"):
            write_text(tmp_path / "a.txt", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not names(tmp_path)


def test_odd_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("")
    for path in ("file/a", "folder", "x" * 300, "nul\0byte"):
        with pytest.raises(UserError):
            write_text(tmp_path / path, "text")
        with pytest.raises(UserError), new_folder(tmp_path / path):
            pass
        with pytest.raises(UserError):
            open_append(tmp_path / path)
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["x"]
    write_text(tmp_path / ("ä" * 120), "text")  # 240 bytes: its temporary name is made shorter


def test_tensors_and_arrays_are_saved_with_their_metadata(tmp_path):
    save_tensors(tmp_path / "t", {"x": torch.arange(3)}, {"k": "2"})
    save_tensors(tmp_path / "n", {"x": np.arange(3)})
    save_tensors(tmp_path / "none", {})
    tensors, metadata = load_tensors(tmp_path / "t")
    assert tensors["x"].tolist() == [0, 1, 2] and metadata["k"] == "2"
    assert load_tensors(tmp_path / "n")[0]["x"].tolist() == [0, 1, 2]
    assert load_tensors(tmp_path / "none")[0] == {}


def test_a_new_folder_is_refused_where_something_is_and_replaces_when_told(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(UserError, match=r"--out .*a: is already there"), new_folder(tmp_path / "a", field="--out "):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a", replace=True) as folder:
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "1"
    with new_folder(tmp_path / "a", replace=True) as folder:
        (folder / "y").write_text("2")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["y"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.raises(UserError, match="already there"), new_folder(tmp_path / "link"):
        pass
    with pytest.raises(UserError, match="GB are free"), new_folder(tmp_path / "c", size=10**18):
        pass
    assert names(tmp_path) == ["a", "empty", "link"]


SLOW = """
import sys, time
from neuroada.files import new_folder
with new_folder(sys.argv[1]):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_of_two_writers_of_a_new_folder_the_second_is_told_at_once(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "a")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} on .* is writing it"), new_folder(tmp_path / "a"):
            pass
        other.kill()
        other.wait()
        with new_folder(tmp_path / "a") as folder:  # takes over, and removes what was left
            (folder / "x").write_text("1")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert names(tmp_path) == ["a"]


def test_a_folder_that_fills_up_from_elsewhere_is_not_replaced(tmp_path):
    with pytest.raises(UserError), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("mine")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("theirs")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "x").read_text() == "theirs"


def _write_for_a_while(path: Path, mark: int) -> None:
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        write_json(path, [mark] * 5000)


def test_many_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "a.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_for_a_while, args=(path, mark)) for mark in range(3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            values = json.loads(path.read_text())
            assert len(values) == 5000 and len(set(values)) == 1
            seen.add(values[0])
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and names(tmp_path) == ["a.json"] and len(seen) > 1


def test_killed_writers_leave_a_whole_file_and_the_next_one_cleans_up(tmp_path):
    context = multiprocessing.get_context("fork")
    path = tmp_path / "a.json"
    write_json(path, [9] * 5000)
    for moment in (0.01, 0.02, 0.03, 0.05, 0.08):
        writer = context.Process(target=_write_for_a_while, args=(path, 1))
        writer.start()
        time.sleep(moment)
        writer.kill()
        writer.join()
        assert len(set(json.loads(path.read_text()))) == 1
    write_json(path, 1)
    assert names(tmp_path) == ["a.json"]


def test_a_kill_between_the_two_renames_of_an_exchange_loses_nothing(tmp_path):
    from neuroada.files.atomic import _temporary

    gone = subprocess.Popen(["true"])
    gone.wait()
    old = _temporary(tmp_path / "a").name.replace(f".{os.getpid()}.", f".{gone.pid}.").replace(".partial", ".old")
    (tmp_path / old).mkdir()
    (tmp_path / old / "x").write_text("1")
    with pytest.raises(UserError, match="already there"), new_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["x"]
