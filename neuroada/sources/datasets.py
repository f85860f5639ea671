"""Data sets by name, singly or by the suite."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from neuroada.errors import UserError
from neuroada.sources import glue, llm_adapters
from neuroada.sources.errors import NotInSource, unknown

ARITHMETIC = ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps")
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
GLUE = tuple(f"glue/{name}" for name in glue.SETS)
SUITES = {
    "commonsense": ("commonsense_170k", "commonsense_15k", *COMMONSENSE),
    "arithmetic": ARITHMETIC,
    "math": ("math_10k", *ARITHMETIC),
    "glue": GLUE,
    "all": (*llm_adapters.SETS, *GLUE),
}
SETS = SUITES["all"]


def fetch_data(name: str, out: Path = Path("data"), source: Path | None = None) -> list[Path]:
    """Bring a set, or every set of a suite, to `<out>/<set>/<split>.json`; returns those files.

    `source` is a folder that already holds copies (`launch/fetch.py data --from`): nothing is downloaded then, what it
    lacks is told at the end in one UserError, and the rest is there. Files that are already in `out` are verified.
    """
    if name not in SUITES and name not in SETS:
        raise unknown("data set", name, [*SETS, *SUITES])
    if source is not None and not source.is_dir():
        raise UserError(f"--from {source}: no such folder")

    paths, missing = [], []
    for member in SUITES.get(name, (name,)):
        for fetch_split in _splits(member):
            try:
                path, note = fetch_split(out, source)
            except NotInSource as error:
                missing.append(str(error))
            else:
                print(f"{path}: {note}", flush=True)
                paths.append(path)
    if missing:
        raise UserError(f"--from {source}: no {', '.join(missing)} there; without --from they are downloaded")
    return paths


def _splits(name: str) -> list[Callable[[Path, Path | None], tuple[Path, str]]]:
    """The splits of a set, each as the function (out, source) -> (path, what was done) that fetches it."""
    if name in GLUE:
        name = name.removeprefix("glue/")
        return [partial(glue.fetch_split, name, split) for split in glue.splits(name)]
    return [partial(llm_adapters.fetch_split, name, split) for split in llm_adapters.splits(name)]
