"""One command at a time in a folder."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.files import FolderLock

HOLD = """
import sys, time
from neuroada.files import FolderLock
FolderLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_held_folder_is_one_line_with_machine_and_process(tmp_path, holder):
    with pytest.raises(UserError) as error, FolderLock(tmp_path / "run", field="output_dir = "):
        pass
    assert str(error.value).startswith(f"output_dir = {tmp_path / 'run'}: process {holder.pid} on {platform.node()}")
    assert (tmp_path / "run" / ".neuroada.lock").exists()  # still the holder's


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie until the fixture waits for it
    with FolderLock(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / ".neuroada.lock").read_text())
        assert owner["pid"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


def test_a_process_number_that_was_given_again_is_not_the_owner(tmp_path):
    lock = FolderLock(tmp_path)
    lock.file.write_text(
        json.dumps({"host": platform.node(), "pid": os.getppid(), "started": 1, "job": None, "life": 0})
    )
    with lock:
        pass
    assert not lock.file.exists()


def test_of_other_machines_only_an_earlier_life_of_the_same_job_is_taken_over(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    lock.file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1, "job": "7", "life": 0}))
    for job, life in (("8", "1"), ("7", "0"), ("7", "a[$(id)]"), (None, None)):
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", life)):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match=r"process 1 on elsewhere .* remove .*\.neuroada\.lock"):
            lock.acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock:
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}', "\udcff", "[" * 100_000])
def test_a_damaged_lock_file_is_one_line(tmp_path, content):
    lock = FolderLock(tmp_path)
    lock.file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="another process is writing it"):
        lock.acquire()


def test_a_process_may_take_its_own_lock_again(tmp_path):
    with FolderLock(tmp_path):
        with FolderLock(tmp_path):
            pass
        assert FolderLock(tmp_path).file.exists()
    assert not FolderLock(tmp_path).file.exists()


def test_a_folder_that_is_made_for_the_lock_goes_with_it(tmp_path):
    with pytest.raises(RuntimeError), FolderLock(tmp_path / "a"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        FolderLock(tmp_path / "file").acquire()
    with pytest.raises(UserError, match="too long"):
        FolderLock(tmp_path / ("x" * 300)).acquire()


TAKE_TURNS = """
import sys
from pathlib import Path
from neuroada.errors import UserError
from neuroada.files import FolderLock
inside = Path(sys.argv[1]) / "inside"
for _ in range(150):
    try:
        with FolderLock(sys.argv[1]):
            inside.open("x").close()
            inside.unlink()
    except UserError:
        pass
"""


def test_never_two_at_once(tmp_path: Path):
    stale = {"host": platform.node(), "pid": 2**22 + 1, "started": 1, "job": None, "life": 0}
    FolderLock(tmp_path).file.write_text(json.dumps(stale))
    others = [subprocess.Popen([sys.executable, "-c", TAKE_TURNS, str(tmp_path)]) for _ in range(3)]
    assert [other.wait() for other in others] == [0, 0, 0]
    assert not list(tmp_path.iterdir())
