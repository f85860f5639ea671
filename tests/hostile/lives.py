"""Commands as processes that have imported everything already: a kill falls into a command's work, not its imports."""

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

from commands import command

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "neuroada.adapter.export",
        "neuroada.engines.single",
        "neuroada.evaluation.after_training",
        "neuroada.methods.neuroada",
        "neuroada.objectives.causal_lm",
        "neuroada.offline.merge",
        "neuroada.offline.quantise",
        "neuroada.offline.select",
        "neuroada.reporting",
        "neuroada.sources.datasets",
        "neuroada.sources.models",
        "neuroada.training.trainer",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
    ]
)


class Life:
    """`neuroada COMMAND ARGUMENTS` in `folder`, started."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        handle, name = tempfile.mkstemp(prefix="neuroada-life-")
        os.close(handle)
        self._log = Path(name)
        self._process = _CONTEXT.Process(target=_live, args=(folder, command, self._log))
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def end(self) -> tuple[int | None, str]:
        """(its exit status, a signal's number negated; what it said), when it has ended."""
        self._process.join()
        said = self._log.read_text(errors="replace")
        self._log.unlink()
        return self._process.exitcode, said


def _live(folder: Path, arguments: list[str], log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    os.chdir(folder)
    sys.argv = arguments
    os.environ["TQDM_DISABLE"] = "1"
    command(arguments[0])()
