"""`neuroada COMMAND ...`: the table of commands. `python -m neuroada` is the same, for launchers that take a module."""

import importlib
from collections.abc import Callable

from neuroada import __version__
from neuroada.cli.command import run
from neuroada.errors import UserError

COMMANDS = {
    "doctor": "examine this machine: what it has, and whether the claims hold on it",
    "train": "train a recipe, on one process or many",
    "preview": "own data as the model will see them",
    "evaluate": "score a model or an adapter on tasks",
    "merge": "write an adapter into its base model, or take it out again",
    "export": "write an adapter in a form that PEFT loads without this package",
    "quantise": "store a base model in four or eight bits",
    "select": "choose connections without building the model",
    "plan": "memory, work and strategy of a recipe, without weights",
    "fetch": "fetch models and data, verified",
    "check-data": "check every data file under a folder",
    "compare": "methods side by side on one task",
    "report": "write a run's or a comparison's report.html again",
    "submit": "submit a recipe to SLURM",
}
"""Name -> what it does. Its module is neuroada/cli/<name>.py."""


def main() -> None:
    """The entry point of the installed command."""
    run(dispatch)


def dispatch(argv: list[str]) -> None:
    if argv and argv[0].startswith("--local_rank"):  # the deepspeed launcher puts it before everything
        argv = [*argv[1:], argv[0]]
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        print("usage: neuroada COMMAND ...\n")
        print("\n".join(f"  {command:{width}}  {about}" for command, about in COMMANDS.items()))
        print("\nneuroada COMMAND --help says more of one.")
    elif name == "--version":
        print(f"neuroada {__version__}")
    elif name not in COMMANDS:
        raise UserError(f"neuroada {name}: no such command; commands: {', '.join(COMMANDS)}")
    else:
        command(name)(argv[1:])


def command(name: str) -> Callable[[list[str]], None]:
    """The `main(argv)` of a command."""
    main: Callable[[list[str]], None] = importlib.import_module(f"neuroada.cli.{name.replace('-', '_')}").main
    return main


def script(name: str) -> None:
    """The whole of a script in launch/: the command `name` with this process' arguments."""
    run(lambda argv: command(name)(argv))


if __name__ == "__main__":
    main()
