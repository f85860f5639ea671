"""The fuzzer: seeded attempts to break a command, family by family, and a table of how each ended.

python tests/hostile/fuzz.py 3000 --seed 1
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # as a script

from judge import judge, run_command, snapshot  # noqa: E402
from mutations import ODD, damage_file, ways  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from submission import SUBMIT, odd_submission, same_arguments  # noqa: E402
from world import TRAIN, make_world  # noqa: E402


@dataclass
class Done:
    """An attempt that ended with status 0: the clean world, this one, the command's arguments and what it printed."""

    clean: Path
    here: Path
    arguments: list[str]
    printed: str
    rng: random.Random


Right = Callable[[Done], str | None]
"""What is wrong with the result of status 0."""
Odd = Callable[[list[str], random.Random], tuple[list[str], str]]
"""The usual arguments -> odd ones, and what is odd about them."""


@dataclass
class Family:
    """Attempts of one kind: a file of `targets` is damaged, `arguments` are made odd, or both."""

    command: str
    arguments: list[str]
    targets: tuple[str, ...] = ()  # globs
    outputs: tuple[str, ...] = ()
    clear: tuple[str, ...] = ()  # removed beforehand
    odd: Odd | None = None
    right: Right = field(default=lambda done: None)


def same_bytes(path: str, of: str | None = None) -> Right:
    """The result is the clean world's, to the byte: damage that is accepted must not matter."""

    def check(done: Done) -> str | None:
        wanted, found = load_file(done.clean / (of or path)), load_file(done.here / path)
        if wanted.keys() != found.keys():
            return f"{path}: other tensors"
        changed = [name for name in wanted if wanted[name].numpy().tobytes() != found[name].numpy().tobytes()]
        return f"silently wrong: {path}: {changed[0]}" if changed else None

    return check


def same_scores(done: Done) -> str | None:
    wanted, found = (
        json.loads((world / "run" / "results.json").read_text())["tasks"] for world in (done.clean, done.here)
    )
    return None if wanted == found else "silently wrong: other scores"


def all_files_counted(done: Done) -> str | None:
    """Every data file that lies there is in the report, with as many rows as it has."""
    report = json.loads(done.printed)
    counted = {f"data/{file['set']}/{file['split']}.json": file["rows"] for file in report["files"]}
    for file in done.clean.glob("data/*/*.json"):
        path = file.relative_to(done.clean)
        here = done.here / path
        if os.path.lexists(here) and not here.is_file():
            return f"silently passed over: {path} is no file"
        rows = json.loads(here.read_text()) if here.exists() else []
        if counted.get(str(path), 0) != len(rows):
            return f"silently wrong: {path} has {len(rows)} rows, told are {counted.get(str(path), 'none')}"
    return None


def no_test_questions(done: Done) -> str | None:
    """The cleaned training set is the rows of the whole one that no test set holds."""
    train, test, cleaned = (
        [
            row["instruction"] + row["input"]
            for row in json.loads((done.here / "data" / name / f"{split}.json").read_text())
        ]
        for name, split in (("math_10k", "train"), ("AddSub", "test"), ("math_10k_clean", "train"))
    )
    reduced = {_letters(question) for question in test}
    wanted = [question for question in train if _letters(question) not in reduced]
    return None if cleaned == wanted else f"silently wrong: {len(cleaned)} rows, not {len(wanted)}"


def _letters(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower()) or text


def submitted(done: Done) -> str | None:
    return same_arguments(done.here, done.arguments, done.printed, done.rng)


FIELDS = ["adapter.k", "adapter.selection", "adapter.method", "adapter.target_modules", "adapter.rank", "optimizer.lr",
          "optimizer.weight_decay", "optimizer.warmup_ratio", "train.epochs", "train.max_steps", "train.seed", "model",
          "train.global_batch_size", "train.micro_batch_size", "train.max_length", "train.dtype", "train.held_out",
          "checkpoint.keep", "checkpoint.every_steps", "engine.name", "engine.ds_config", "task", "data_dir", "x", "",
          "evaluate.tasks", "evaluate.limit", "adapter", "train", "train.packing", "a.b.c", "report_to"]  # fmt: skip


def make_odd(usual: list[str], rng: random.Random) -> tuple[list[str], str]:
    """One argument replaced, doubled or added."""
    arguments = list(usual)
    if any("=" in argument for argument in arguments):
        new = f"{rng.choice(FIELDS)}={_text(rng)}"
        return [*arguments, new], new
    values = [n for n in range(1, len(arguments)) if arguments[n - 1].startswith("--")]
    kind = rng.choice(["value", "value", "value", "add", "drop"])
    if kind == "value":
        at = rng.choice(values)
        arguments[at] = _text(rng)
        return arguments, f"{arguments[at - 1]} {arguments[at]}"
    if kind == "add":
        return [*arguments, new := _text(rng)], new
    at = rng.choice(range(len(arguments)))
    return arguments[:at] + arguments[at + 1 :], f"without {arguments[at]}"


def _text(rng: random.Random) -> str:
    """An odd value as a command line can carry it."""
    more = ["model", "adapter", "data", "run", "nowhere", "model/config.json", "--x", "=", "[1", "{a: 1"]
    return str(rng.choice([*ODD, *more])).replace("\0", "")[:3000]


MERGE = ["--adapter", "adapter", "--out", "out"]
EVALUATE = ["--adapter", "run/adapter", "--tasks", "AddSub", "--limit", "2", "--out", "out"]
SELECT = ["--model", "model", "--k", "2", "--target-modules", "q_proj", "--out", "out.safetensors", "--workers", "1"]
CLEAN = ["--data-dir", "data", "--clean", "math"]
RUN = ["--recipe", "recipe.yaml", *TRAIN]
OWN = ["--recipe", "own.yaml", *TRAIN]
SUBMITTED = ("submitted", "run", "x", "[red]x[")  # or what damage has made of output_dir
BOTH = ("run", "own", "runs", "data/.tokens")  # of either recipe, which may take the other's place
MODEL = ("model/*.json", "model/*.safetensors", "model/*.safetensors")
FAMILIES = {
    "merge: adapter": Family("merge", MERGE, ("adapter/adapter_*",), ("out",),
                             right=same_bytes("out/model.safetensors", "merged/model.safetensors")),
    "merge: model": Family("merge", MERGE, MODEL, ("out",)),
    "unmerge": Family("merge", ["--unmerge", "--model", "merged", "--out", "out"],
                      ("merged/model.safetensors", "merged/unmerge/*", "merged/config.json"), ("out",),
                      right=same_bytes("out/model.safetensors", "model/model.safetensors")),
    "select: model": Family("select", SELECT, MODEL, ("out.safetensors",)),
    "evaluate: adapter": Family("evaluate", EVALUATE, ("run/adapter/adapter_*", "run/recipe.yaml"), ("out",)),
    "evaluate: model": Family("evaluate", ["--model", "model", *EVALUATE[2:]], MODEL, ("out",)),
    "evaluate: data": Family("evaluate", EVALUATE, ("data/*/*.json",), ("out",)),
    "evaluate: scores": Family("evaluate", EVALUATE[:4], ("run/results.json", "run/predictions/*"),
                               ("run/results.json", "run/predictions", "run/report.html", "run/adapter/README.md")),
    "report": Family("report", ["run"], ("run/*.json", "run/*.jsonl", "run/*.yaml", "run/adapter/adapter_*"),
                     ("run/report.html", "run/adapter/README.md")),
    "check-data": Family("check-data", ["--data-dir", "data", "--json"], ("data/*/*.json",), right=all_files_counted),
    "check-data: clean": Family("check-data", CLEAN, ("data/*/*.json",), ("data/math_10k_clean",),
                                right=no_test_questions),
    "check-data: tokenizer": Family("check-data", ["--data-dir", "data", "--tokenizer", "model"], ("model/tok*",)),
    "check-data: arguments": Family("check-data", CLEAN, (), ("data/math_10k_clean",), odd=make_odd),
    "submit": Family("submit", SUBMIT, ("recipe.yaml", "model/config.json"), SUBMITTED, right=submitted),
    "submit: arguments": Family("submit", SUBMIT, (), SUBMITTED, odd=odd_submission, right=submitted),
    "train: recipe": Family("train", RUN, ("recipe.yaml",), BOTH, ("run",)),
    "train: model": Family("train", RUN, MODEL, ("run", "data/.tokens"), ("run",)),
    "train: data": Family("train", RUN, ("data/math_10k/*",), ("run", "data/.tokens"), ("run",)),
    "train: tokens": Family("train", RUN, ("data/.tokens/*.safetensors",), ("run", "data/.tokens"), ("run",),
                            right=same_bytes("run/adapter/adapter_model.safetensors")),
    "train: selection": Family("train", [*RUN, "adapter.selection_file=selection.safetensors"],
                               ("selection.safetensors",), ("run", "data/.tokens"), ("run",),
                               right=same_bytes("run/adapter/adapter_model.safetensors")),
    "train: checkpoint": Family("train", RUN, ("run/checkpoints/step-000002/*", "run/*.json*", "run/recipe.yaml"),
                                ("run", "data/.tokens"), right=same_bytes("run/adapter/adapter_model.safetensors")),
    "export": Family("export", ["--as", "shira", *MERGE], ("adapter/adapter_*", *MODEL[:2]), ("out",),
                     right=same_bytes("out/adapter_model.safetensors", "exported/adapter_model.safetensors")),
    "quantise": Family("quantise", ["--model", "model", "--format", "int8", "--exact", "2", "--out", "out"],
                       MODEL, ("out",)),
    "preview": Family("preview", ["--recipe", "own.yaml"], ("own.yaml", "rows.jsonl", "model/tok*"), ("data/.tokens",)),
    "report: own data": Family("report", ["own"], ("own/*.json", "own/*.jsonl"),
                               ("own/report.html", "own/adapter/README.md")),
    "report: comparison": Family("report", ["compared"], ("compared/*.json", "compared/runs/*/*/metrics.jsonl"),
                                 ("compared/report.html", "compared/comparison.json")),
    "train: own data": Family("train", OWN, ("own.yaml", "rows.jsonl"), BOTH, ("own",)),
    "train: own tokens": Family("train", OWN, ("data/.tokens/*/*",), ("own", "data/.tokens"), ("own",),
                                right=same_bytes("own/adapter/adapter_model.safetensors")),
    "merge: arguments": Family("merge", MERGE, (), ("out",), odd=make_odd),
    "select: arguments": Family("select", SELECT, (), ("out.safetensors",), odd=make_odd),
    "evaluate: arguments": Family("evaluate", EVALUATE, (), ("out",), odd=make_odd),
    "train: fields": Family("train", RUN, (), ("run", "data/.tokens"), ("run",), odd=make_odd),
    "plan: model": Family("plan", ["--recipe", "recipe.yaml", "--gpus", "1", "engine.name=single"],
                          ("model/*.json", "recipe.yaml")),
    "plan: fields": Family("plan", ["--recipe", "recipe.yaml", "--gpus", "1", "engine.name=single"],
                           odd=make_odd),
}  # fmt: skip
SLOW = ("train: recipe", "train: model", "train: data", "train: fields", "plan: fields", "plan: model",
        "train: checkpoint", "train: selection", "train: tokens", "train: own data", "train: own tokens")  # fmt: skip


class Fuzzer:
    """Attempts by number: the same seed and number are the same attempt, whatever ran before."""

    def __init__(self, folder: Path, seed: int, log: Callable[[str], None] | None = None) -> None:
        self.folder, self.seed, self.log = folder, seed, log
        self.clean = make_world(folder / "clean")

    def attempt(self, number: int, name: str) -> tuple[str, str | None]:
        """How it ended (right | one line | wrong), and what is wrong."""
        family, rng = FAMILIES[name], random.Random(f"{self.seed} {number} {name}")
        here = self.folder / "world"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self.clean, here)
        arguments, done = list(family.arguments), ""
        for path in family.clear:
            shutil.rmtree(here / path)
        if family.targets:
            files = sorted(file for glob in family.targets for file in here.glob(glob) if file.is_file())
            target = rng.choice(files)
            damages = ways(target)
            damage = rng.choice(damages)
            try:
                done = f"{target.relative_to(here)}: {damage(target, rng)}"
            except (ValueError, IndexError, RuntimeError):  # does not apply to this file
                done = f"{target.relative_to(here)}: {damage_file(target, rng)}"
        if family.odd:
            arguments, said = family.odd(arguments, rng)
            done = f"{done} {said[:100]!r}"
        outputs = (*family.outputs, *(arguments[n + 1] for n, word in enumerate(arguments[:-1]) if word == "--out"))
        if self.log:
            self.log(f"{number} {name}: {done}")
        before = snapshot(here)
        outcome = run_command(family.command, arguments, here)
        result = Done(self.clean, here, arguments, outcome.printed, rng)
        wrong = judge(outcome, before, here, outputs, lambda: family.right(result))
        ended = "wrong" if wrong else "right" if outcome.status == 0 else "one line"
        return ended, f"attempt {number} of seed {self.seed}, {name}: {done}: {wrong}" if wrong else None


def schedule(count: int) -> list[str]:
    """Families by turns, those that train one turn in four."""
    fast = [name for name in FAMILIES if name not in SLOW]
    order = [*fast, *fast, *fast, *fast, *SLOW]
    return [order[number % len(order)] for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attempts", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", help="only this one")
    parser.add_argument("--first", type=int, default=0, help="number of the first attempt")
    parser.add_argument("--log", type=Path, help="write each attempt there before it is made")
    args = parser.parse_args()
    log = args.log.open("w", buffering=1) if args.log else None
    names = [args.family] * args.attempts if args.family else schedule(args.first + args.attempts)[args.first :]
    table: dict[str, Counter[str]] = {name: Counter() for name in dict.fromkeys(names)}
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder) / "fuzz", args.seed, log and (lambda text: print(text, file=log)))
        for number, name in enumerate(names, args.first):
            started = time.perf_counter()
            ended, wrong = fuzzer.attempt(number, name)
            seconds[name] += time.perf_counter() - started
            table[name][ended] += 1
            if wrong:
                print(wrong, flush=True)
    print("| family | attempts | right result | one line | wrong | s each |\n| --- | --- | --- | --- | --- | --- |")
    for name, row in table.items():
        n = sum(row.values())
        print(f"| {name} | {n} | {row['right']} | {row['one line']} | {row['wrong']} | {seconds[name] / n:.2f} |")


if __name__ == "__main__":
    main()
