"""The two ways a command ends early, and the exit status of each."""

import os
import platform


class UserError(ValueError):
    """An error in what the user gave, in one line: field or file, its value, what would be right. Exit status 2."""


class Preempted(Exception):
    """Stopped early on request, with a checkpoint saved: run the same command again. Exit status 75 (EX_TEMPFAIL)."""


def node_name() -> str:
    """This machine's name in messages: SLURM's for it, or its own."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()
