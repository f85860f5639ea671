"""Tasks of lm-evaluation-harness: `lm_eval:NAME`, scored by that library, in results.json like any other.

Its questions, prompts, few-shot examples and metrics are its own, and its logs; no predictions are written. All ranks
answer what it asks (neuroada/evaluation/harness_requests.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroada.errors import UserError
from neuroada.evaluation.harness_requests import divide, serve
from neuroada.evaluation.ranks import Ranks, joined, locked
from neuroada.evaluation.results import averages, check_smaller, kept_scores, to_json
from neuroada.files import read_json, write_text
from neuroada.tasks import scoring
from neuroada.tasks.statistics import RULES, wilson
from neuroada.tasks.table import HARNESS, TASKS, Answers, Rule, Task, is_task_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACCURACIES = ("acc", "exact_match", "em", "acc_norm")  # the metric that stands for a task: the first that it has
CONTEXT = 2048  # tokens that a row of the library's batches is taken to have


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task of the library. `source`: its name there, or the path of its YAML file."""

    source: str = ""
    questions: int = 0


def load_harness_task(name: str) -> HarnessTask:
    """The task `lm_eval:NAME`. Its data are read, and fetched where they are missing.

    UserError: the library is not installed, there is no such task, it is a group, it has no accuracy, its data cannot
    be had.
    """
    source = name.removeprefix(HARNESS)
    task = _load(source)
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"{name}: runs code that the model writes; score it by lm_eval itself, in a sandbox")
    metrics = list(task.aggregation())
    if not set(metrics) & set(ACCURACIES):
        raise UserError(
            f"{name}: its metrics are {', '.join(metrics)}, no accuracy ({', '.join(ACCURACIES)}); score it by lm_eval"
        )
    import lm_eval

    count = len(task.eval_docs)
    theirs = Rule(str.strip, scoring.same_text)  # the library judges
    return HarnessTask(
        name=f"{HARNESS}{task.task_name}",
        suite="lm_eval",
        prompt=lambda example: "",
        target=lambda example: "",
        published=theirs,
        sound=theirs,
        max_new_tokens=0,
        answers=Answers("any", lambda text: True),
        baseline=scoring.zero,
        generate=lambda split: [{}] * count,
        version=f"lm_eval {lm_eval.__version__}, version {task.VERSION}",
        source=source,
        questions=count,
    )


@cache
def _manager(its_own: bool) -> Any:
    """What loads the library's tasks: by name, `its_own`, after seconds of reading; a task file without."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=its_own)


def _load(source: str) -> Any:
    name = f"{HARNESS}{source}"
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(f"{name}: lm-evaluation-harness is not installed; pip install lm_eval") from None
    try:
        loaded = _manager(not is_task_file(source)).load([source])
    except Exception as error:  # no such name, a task file that is wrong, a data set that cannot be fetched
        if isinstance(error, KeyError) and not Path(source).is_file():
            raise UserError(
                f"{name}: lm_eval has no such task, and there is no such file; `lm_eval ls tasks` lists them"
            ) from None
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: lm_eval cannot load it ({said[:300]})") from None
    tasks = loaded["tasks"]
    if loaded["groups"] or len(tasks) != 1:
        members = ", ".join(f"{HARNESS}{member}" for member in list(tasks)[:3])
        raise UserError(f"{name}: is a group of {len(tasks)} tasks; name those to score, such as {members}")
    return next(iter(tasks.values()))


def evaluate_harness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[HarnessTask],
    out: Path,
    header: Mapping[str, Any],
    *,
    limit: int | None,
    batch_tokens: int,
) -> dict[str, Any]:
    """Add the scores of `tasks` to `out`/results.json; return its content on every rank. Collective."""
    from lm_eval.models.huggingface import HFLM

    with joined() as ranks, locked(out, ranks.rank):
        kept = kept_scores(out, header, tasks)
        check_smaller(out, kept, {task.name: len(range(task.questions)[:limit]) for task in tasks})
        served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=max(1, batch_tokens // CONTEXT))
        if ranks.rank == 0:
            entries = kept | _scores(served, tasks, limit, ranks)
            means = averages([TASKS[name] for name in entries if name in TASKS], entries)
            write_text(out / "results.json", to_json({**header, "tasks": entries, "averages": means}))
        else:
            serve(served, ranks)
        ranks.barrier()
        results: dict[str, Any] = read_json(out / "results.json")
    return results


def _scores(served: Any, tasks: Sequence[HarnessTask], limit: int | None, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The tasks' entries in results.json. On rank 0, the others in `serve`, which ends with it."""
    if ranks.world_size > 1:
        divide(served, ranks)
    entries = {task.name: _score(served, task, limit) for task in tasks}
    ranks.scatter([None] * ranks.world_size)  # nothing more is asked
    return entries


def _score(served: Any, task: HarnessTask, limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    found: Any = simple_evaluate(
        served,
        tasks=[task.source],
        limit=limit,
        bootstrap_iters=0,
        task_manager=_manager(not is_task_file(task.source)),
    )
    (name,) = found["results"]
    metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, float) and "," in key}
    samples = found["samples"][name]
    return entry_of(metrics, found["n-samples"][name]["effective"], _chance(found["configs"][name], samples), task)


def entry_of(metrics: Mapping[str, float], n: int, chance: float, task: Task) -> dict[str, Any]:
    """The library's numbers as an entry of results.json: its first accuracy by both rules, all of them beside it.

    metrics: by "name,filter", such as "acc,none".
    """
    main = next(key for name in ACCURACIES for key in metrics if key.partition(",")[0] == name)
    value = metrics[main]
    return {
        "n": n,
        **dict.fromkeys(RULES, value),
        "interval": dict.fromkeys(RULES, wilson(round(value * n), n)),
        "unseen": None,
        "baseline": chance,
        "too_long": 0,
        "version": task.version,
        "metric": main,
        "metrics": {key: value for key, value in metrics.items() if "_stderr," not in key},
    }


def _chance(config: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> float:
    """The score of drawing an option; 0 where answers are generated."""
    if config.get("output_type") != "multiple_choice":
        return 0.0
    return sum(1 / len(sample["filtered_resps"]) for sample in samples) / len(samples)
