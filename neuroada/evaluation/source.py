"""What an evaluation is asked to do, checked before anything heavy is imported."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from neuroada.errors import UserError
from neuroada.files import check_inside, check_schema, read_bytes, read_yaml
from neuroada.tasks.table import HARNESS, TASKS, Task, get_task, is_task_file


def resolve_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks called `names`, whose answers are generated; see `find_tasks`. UserError: a classifier's task too."""
    tasks = find_tasks(names)
    for task in tasks:
        if task.objective == "classification":
            raise UserError(
                f"task {task.name}: is classified, not generated; leave evaluate.tasks out, and a run is scored on it"
            )
    return tasks


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks called `names`, each once.

    A suite's name (math, commonsense) stands for its tasks that have a test, the path of a YAML file for the task that
    it describes, lm_eval:NAME for one of lm-evaluation-harness. UserError: an unknown name, no name at all, a task file
    with something wrong.
    """
    tasks: dict[str, Task] = {}
    for name in filter(None, dict.fromkeys(name.strip() for name in names)):
        if name.startswith(HARNESS):
            from neuroada.evaluation.harness import load_harness_task

            theirs = load_harness_task(name)
            tasks[theirs.name] = theirs
            continue
        if is_task_file(name):
            from neuroada.data.task_file import load_task

            own = load_task(name)
            if own.name in tasks:
                raise UserError(f"tasks: {name} is a task called {own.name}, and there is another; set its name")
            tasks[own.name] = own
            continue
        suite = [task for task in TASKS.values() if task.suite == name and task.tests_its_suite]
        for task in suite or [get_task(name)]:
            tasks[task.name] = task
    if not tasks:
        raise UserError("tasks: names no task; give some, such as --tasks AddSub,gsm8k or --tasks math")
    return list(tasks.values())


class TrainedOn(BaseModel):
    """Of a run's recipe, of any version, the field that says what its questions were."""

    task: str | None = None


@dataclass(frozen=True)
class Source:
    """The model to evaluate: `model`, a folder or a hub id, under the PEFT adapter in the folder `adapter`, if any."""

    model: str
    adapter: Path | None = None

    @classmethod
    def from_arguments(cls, model: str | None, adapter: str | None, base_model: str | None) -> "Source":
        """Exactly one of `model` and `adapter`; the adapter's base is the one it names unless `base_model` does.

        UserError: both or neither, a folder that does not exist or holds something else, an adapter without a base.
        """
        if (model is None) == (adapter is None):
            raise UserError("give either --model DIR or --adapter DIR")
        if model is not None:
            if base_model is not None:
                raise UserError(f"base-model: {base_model!r} goes with --adapter; --model is evaluated as it is")
            return cls(str(_folder("model", model, "config.json", "a Hugging Face checkpoint")))
        from neuroada.adapter.adapter_file import read_config

        folder = _folder("adapter", str(adapter), "adapter_config.json", "a PEFT adapter")
        base = base_model or read_config(folder).base_model_name_or_path
        if not base:
            raise UserError(
                f"{folder / 'adapter_config.json'}: base_model_name_or_path is missing; give --base-model DIR"
            )
        if base_model is not None:
            _folder("base-model", base_model, "config.json", "a Hugging Face checkpoint")
        return cls(str(base), folder)

    @classmethod
    def of_trained(cls, saved: Path, base: str) -> "Source":
        """What a run saved: an adapter of `base`, or a model of its own."""
        return cls(base, saved) if (saved / "adapter_config.json").is_file() else cls(str(saved))

    @property
    def run(self) -> Path | None:
        """The training run's folder, if the adapter is in one (`runs/X/adapter` beside `runs/X/recipe.yaml`)."""
        run = self.adapter.resolve().parent if self.adapter else None
        return run if run and (run / "recipe.yaml").is_file() else None

    @property
    def trained_on(self) -> str | None:
        """The task that the run's recipe names; None without a run."""
        if self.run is None:
            return None
        path = self.run / "recipe.yaml"
        check_inside(self.run, path)
        return check_schema(TrainedOn, read_yaml(path), str(path)).task

    def default_out(self) -> Path:
        """The run's folder, else results/<name of the adapter or model>."""
        return self.run or Path("results") / (self.adapter or Path(self.model)).resolve().name

    def identity(self) -> dict[str, object]:
        """Changes when the weights do: a sample of the model's tensors, a hash of the adapter's files."""
        from neuroada.hf.model_folder import sample_weights

        adapter = sorted(self.adapter.glob("adapter_*")) if self.adapter else []
        return {
            "model": [self.model, sample_weights(Path(self.model))],
            "adapter": [[f.name, hashlib.sha256(read_bytes(f, limit=1 << 40)).hexdigest()] for f in adapter],
        }


def _folder(field: str, folder: str, file: str, kind: str) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{field}: {folder!r} is no folder; give the folder of {kind}")
    if not (path / file).is_file():
        other = "; it is an adapter: give it as --adapter" if (path / "adapter_config.json").is_file() else ""
        raise UserError(f"{field}: {folder!r} is not {kind}: it has no {file}{other}")
    return path
