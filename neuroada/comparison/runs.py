"""The runs of a comparison: each is trained and measured in processes and a folder of its own, once."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import neuroada
from neuroada.comparison.contenders import Comparison
from neuroada.comparison.files import read_result
from neuroada.comparison.general_text import identity
from neuroada.config.recipe import Recipe
from neuroada.errors import Preempted, UserError
from neuroada.files import open_append, read_bytes, write_json


def one(
    recipe: Recipe, comparison: Comparison, launcher: str, *, keep: bool, base: bool = False, gpu: str | None = None
) -> dict[str, Any]:
    """The result of one run: read if it is there, else trained and measured, each in a process of its own.

    gpu: the one its processes see, as CUDA_VISIBLE_DEVICES names it; None: all that this process sees.
    """
    folder = Path(recipe.output_dir)
    result_file, asked = folder / "result.json", deciding(recipe, base, comparison.general_text)
    if result_file.is_file():
        result = read_result(result_file)
        for field in asked:
            if result["recipe"].get(field) != asked[field]:
                raise UserError(
                    f"--out {comparison.out}: {folder.relative_to(comparison.out)} was run with {field} = "
                    f"{result['recipe'].get(field)}, not {asked[field]}; choose another folder"
                )
        return result
    print(f"== {folder.relative_to(comparison.out)}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "asked.yaml")
    root = str(Path(neuroada.__file__).parents[1])  # a checkout that is not installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if not base:
        command = [*module(launcher), "neuroada", "train", "--recipe", str(folder / "asked.yaml")]
        trained, said = follow(command, environment, folder / "train.log")
        last = next((line for line in reversed(said.splitlines()) if line.startswith("error: ")), "")
        if trained == 75:
            raise Preempted("stopped during a run; run the same command to go on")
        if trained and "gradient norm" in last:  # a rate too high for the method: a result, not an error
            result = {"recipe": asked, "diverged": last.removeprefix("error: "), "validation": None}
            write_json(result_file, result)
            return result
        if trained == 2:
            raise UserError(last.removeprefix("error: "))
        if trained:
            raise RuntimeError(f"{shlex.join(command)}: exit {trained}\n{said[-4000:]}")
    command = [sys.executable, "-m", "neuroada", "compare", "--measure", str(folder), "base" if base else "run"]
    command += [comparison.general_text] if comparison.general_text else []
    measured, said = follow(command, environment, folder / "measure.log")
    if measured:
        raise RuntimeError(f"{shlex.join(command)}: exit {measured}\n{said[-4000:]}")
    if not keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "model", ignore_errors=True)  # of methods that train whole weights
    return read_result(result_file)


def deciding(recipe: Recipe, base: bool, general_text: str | None) -> dict[str, Any]:
    """The fields that two runs must share to be one; the base model's are those it is measured by."""
    text = {"general_text": identity(general_text)} if general_text else {}
    if not base:
        return recipe.model_dump(exclude={"output_dir"}) | text
    measured_by = recipe.model_dump(include={"model", "task", "data", "objective", "data_dir", "evaluate"}) | text
    return {**measured_by, "train": recipe.train.model_dump(include={"held_out", "max_length"})}


def follow(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, str]:
    """Run a command, all it prints into `log`; its exit status, and what it printed."""
    log.unlink(missing_ok=True)
    with open_append(log) as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return done.returncode, read_bytes(log, limit=1 << 32).decode(errors="replace")


def module(launcher: str) -> list[str]:
    """The launcher's command line, up to the option that makes it run a module."""
    words = shlex.split(launcher)
    return [*words, "--module" if Path(words[0]).name == "deepspeed" else "-m"]
