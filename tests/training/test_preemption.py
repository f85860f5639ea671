import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed_runs import assert_same_curve, losses

from neuroada.config.recipe import load_recipe
from neuroada.engines.watchdog import Watchdog
from neuroada.errors import Preempted
from neuroada.training.signals import SIGNALS, StopRequest
from neuroada.training.trainer import train

REPOSITORY = Path(__file__).resolve().parents[2]

STUCK = """
import ctypes, threading
from neuroada.training import signals
signals.ECHO_SECONDS = 0.3
stop = signals.StopRequest()
print("ready", flush=True)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)  # for ever, and no signal ends it: as a collective call whose other side is gone
"""


def stuck_process() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_second_signal_ends_at_once_even_inside_a_call_that_never_returns(second: signal.Signals) -> None:
    process = stuck_process()
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(5) == 128 + second


def test_copies_of_one_signal_are_one() -> None:
    process = stuck_process()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.8)
    process.kill()
    process.wait()


@contextmanager
def ranks(port: int, *overrides: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks under FSDP2, as a launcher would start them; none of them outlives the block."""
    command = [sys.executable, "launch/train.py", "--recipe", "tiny_arithmetic", "engine.name=fsdp2", *overrides]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # fmt: skip
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_signal_to_one_rank_stops_all_with_75_and_the_next_start_goes_on(tiny: Path, tmp_path: Path) -> None:
    overrides = [f"model={tiny}", f"data_dir={tmp_path / 'data'}", "train.max_steps=60", "checkpoint.every_steps=60"]
    port = 20000 + os.getpid() % 10000
    metrics = tmp_path / "run" / "metrics.jsonl"
    with ranks(port, *overrides, f"output_dir={tmp_path / 'run'}") as started:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
            assert all(process.poll() is None for process in started)
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [75, 75]
    assert "preempted: stopped at step" in told[0] and "preempted" not in told[1]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 5 <= int(checkpoint.name[5:]) < 60

    for number, name in enumerate(("run", "undisturbed"), 1):
        with ranks(port + number, *overrides, f"output_dir={tmp_path / name}") as started:
            for process in started:
                process.communicate(timeout=600)
                assert process.returncode == 0
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "undisturbed"))


@pytest.mark.parametrize("selection", ["gradient", "wanda"])
def test_a_signal_while_connections_are_chosen(
    selection: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a whole training set that takes hours: it is no part of the start, and waits for no step to stop at."""
    overrides = [f"adapter.selection={selection}", "adapter.calibration_examples=40", "train.max_steps=1"]
    places = [f"model={tiny}", f"output_dir={tmp_path / 'run'}", f"data_dir={tmp_path / 'data'}", "engine.name=single"]
    recipe = load_recipe("tiny_arithmetic", [*places, *overrides])
    watched: list[str | None] = []
    with monkeypatch.context() as patch:
        patch.setattr(Watchdog, "watch", lambda self, what: watched.append(what))
        stop = StopRequest()
        patch.setattr(stop, "agreed", lambda engine: watched[-1] == "pass 5 of 5 of the selection")
        with pytest.raises(Preempted, match="stopped before pass 5 of 5 of the selection"):
            train(recipe, stop)
        stop.close()
    passes = [what for what in watched if what is not None and what.startswith("pass")]
    assert passes == [f"pass {number} of 5 of the selection" for number in range(1, 6)]
    assert "for the 2 passes of the selection left" in capsys.readouterr().out
    assert not (tmp_path / "run" / "selection.safetensors").exists()
    train(recipe)
    assert (tmp_path / "run" / "selection.safetensors").exists()


def test_the_process_has_its_own_handlers_back(tiny: Path, tmp_path: Path) -> None:
    """Else a child that is forked after a training, such as a pool's worker, would survive the SIGTERM that ends it."""
    before = [signal.getsignal(number) for number in SIGNALS]
    train(load_recipe("tiny_arithmetic", [f"model={tiny}", f"output_dir={tmp_path}", "train.max_steps=1",
                                          f"data_dir={tmp_path / 'data'}", "engine.name=single"]))  # fmt: skip
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    for thread in [thread for thread in threading.enumerate() if thread.name == "stop request"]:
        thread.join(5)
        assert not thread.is_alive()
