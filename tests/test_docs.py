"""Every command line in the README and docs/: it is one that its script accepts, of a recipe that loads."""

import argparse
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuroada.config import reference
from neuroada.config.recipe import load_recipe
from neuroada.evaluation.source import find_tasks
from neuroada.sources.datasets import SUITES
from neuroada.sources.models import MODELS
from neuroada.tasks.table import HARNESS, is_task_file

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "launch/slurm/README.md",
         *(f"docs/{page.name}" for page in REPOSITORY.glob("docs/*.md"))]  # fmt: skip
SCRIPT = re.compile(r"(?:launch|benchmarks)/(?:slurm/)?\w+\.(?:py|sbatch)")


INSTALLED = re.compile(r"^(?:python -m )?neuroada ([a-z][a-z-]*)(?= |$)")


def as_script(found: re.Match[str]) -> str:
    """The installed command as its script in launch/."""
    name = found[1].replace("-", "_")
    return f"python launch/{'select_connections' if name == 'select' else name}.py"


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of each line in a block that runs a command, or a script of launch/ or benchmarks/."""
    for page in PAGES:
        text = (REPOSITORY / page).read_text().replace("\\\n", " ")
        fenced = False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif fenced or line.startswith("    "):
                line = INSTALLED.sub(as_script, line.strip())
                if SCRIPT.search(line):
                    yield page, line


class Parsed(Exception):
    """Stops a script as soon as it has read its arguments."""


def arguments_of(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)

        def parse(self, *args, original=original, **kwargs):
            raise Parsed(original(self, *args, **kwargs))

        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    return parsed.value.args[0]


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_command_of_the_docs_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = re.sub(r"(?<=\s)\[([^]]*)\]", r"\1", command)  # optional parts, in brackets
    words = shlex.split(command, comments=True)
    place = next(number for number, word in enumerate(words) if SCRIPT.fullmatch(word))
    script, arguments = words[place], words[place + 1 :]
    assert (REPOSITORY / script).is_file()
    if script.endswith("train.sbatch"):
        options = dict(word.lstrip("-").split("=") for word in words[1:place])
        assert options["gpus-per-node"] == options["ntasks-per-node"]  # one task for each GPU
        load_recipe(arguments[0], arguments[1:]).micro_batches(int(options["nodes"]) * int(options["ntasks-per-node"]))
    if script.endswith(".sbatch"):
        return
    if any(word in ("R", "key=value", "N", "GIB") for word in arguments):  # a usage line, not a command
        meant = {"R": "llama7b_math", "key=value": "adapter.k=1", "N": "2", "GIB": "24"}
        arguments = [meant.get(word, word) for word in arguments]
    found = arguments_of(script, arguments, monkeypatch)
    if script in ("launch/train.py", "launch/plan.py", "launch/submit.py", "launch/compare.py"):
        overrides = [word for word in found.overrides if not word.startswith("ranks=") and word != "..."]
        recipe = load_recipe(found.recipe, overrides)
        ranks = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
        if script == "launch/submit.py":
            ranks = (found.nodes or 1) * found.gpus_per_node
        recipe.micro_batches(ranks)
    if script == "launch/evaluate.py":
        names = [name for name in found.tasks.split(",") if not is_task_file(name) and not name.startswith(HARNESS)]
        assert find_tasks(names)
    if script == "launch/fetch.py":
        sets = {name for members in SUITES.values() for name in members}
        assert found.name in (MODELS if found.kind == "model" else {*SUITES, *sets})


def test_the_table_of_every_field_is_the_schemas() -> None:
    """`python -m neuroada.config.reference` prints it."""
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    held = page.partition("<!-- fields: begin -->\n")[2].partition("\n<!-- fields: end -->")[0]
    assert held == reference.table()
    assert all(meaning for *_, meaning in reference.fields())
