"""The commands under attack, as `neuroada COMMAND` runs them."""

from collections.abc import Callable

from neuroada.cli.main import script


def command(name: str) -> Callable[[], None]:
    return lambda: script(name)
