"""The two ways a command ends early, and the exit status of each."""


class UserError(ValueError):
    """A mistake in what the user gave. One line: the field or file, its value, and what would be right. Exit status 2."""


class Preempted(Exception):
    """Stopped early on request, with a checkpoint saved: run the same command again. Exit status 75 (EX_TEMPFAIL)."""
