"""Own data through whole runs: the same losses for every format under every engine, packing, streams, validation."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from distributed_runs import TinyRuns, assert_same_curve, losses
from safetensors.torch import load_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.hf.loading import load_tokenizer
from neuroada.objectives import make_objective
from neuroada.objectives.loss_validation import LossValidation
from neuroada.training.trainer import train

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}|{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def rows(name: str, count: int = 60) -> list[dict]:
    found = []
    for i in range(count):
        asked, said = f"{i} plus {i + 1} is ", f"{2 * i + 1}" + " and so on" * (i % 5)
        found.append(
            {
                "chat": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] * 2},
                "prompt_completion": {"prompt": asked, "completion": said},
                "alpaca": {"instruction": "Add.", "input": asked, "output": said},
                "text": {"text": asked + said * (1 + i % 4 * 8)},
                "dpo": {"prompt": asked, "chosen": said, "rejected": "no" * (1 + i % 3)},
                "orpo": {"prompt": asked, "chosen": said, "rejected": "no" * (1 + i % 3)},
            }[name]
        )
    return found


FORMATS = ["chat", "prompt_completion", "alpaca", "text", "dpo", "orpo"]
RUNS = {"single": ("single", 1), "zero3": ("zero3", 2), "fsdp2": ("fsdp2", 2)}


def fields(folder: Path, name: str, *more: str, **data: object) -> list[str]:
    """Overrides that replace the tiny recipe's task by a file of rows of the format `name`."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
    (folder / "short.jinja").write_text(TEMPLATE)
    section = {"datasets": [{"path": str(path)}], "chat_template": str(folder / "short.jinja"), **data}
    objective = [f"objective.name={name}"] if name in ("dpo", "orpo") else []
    return [
        "task=null",
        f"data={yaml.safe_dump(section, default_flow_style=True, width=10**6).strip()}",
        *objective,
        *more,
    ]


@pytest.fixture(scope="module")
def curves(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every format in one process, under ZeRO-3 and under FSDP2 on 2 ranks; and packed otherwise, in one process."""
    folder = tmp_path_factory.mktemp("rows")
    found = {}
    for name in FORMATS:
        held = {"validation": {"size": 7}}
        for run, (engine, ranks) in RUNS.items():
            wanted = fields(folder, name, "train.max_length=256", "evaluate.every_steps=4", **held)
            found[name, run] = tiny_runs.add(f"own_{name}_{run}", engine, ranks, *wanted)
        wanted = fields(folder, name, "train.max_length=256", "evaluate.every_steps=4", "train.packing=false", **held)
        found[name, "padded"] = tiny_runs.add(f"own_{name}_padded", "single", 1, *wanted)
    tiny_runs.run()
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("run", ["zero3", "fsdp2", "padded"])
def test_the_same_curve(curves: dict[tuple[str, str], Path], name: str, run: str) -> None:
    assert_same_curve(losses(curves[name, run]), losses(curves[name, "single"]))
    found, expected = (
        [entry["loss"] for entry in json.loads((curves[name, r] / "validation.json").read_text())["measured"]]
        for r in (run, "single")
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == 3 and found[2] < found[1] < found[0]  # before training, after 4 steps, after 8


def run_tiny(folder: Path, tiny: Path, *overrides: str) -> Path:
    common = [f"model={tiny}", f"data_dir={folder / 'data'}", "engine.name=single", "train.global_batch_size=12",
               "train.micro_batch_size=2", "train.max_length=256", "train.max_steps=6"]  # fmt: skip
    recipe = load_recipe("tiny_arithmetic", [*common, *overrides])
    train(recipe)
    return Path(recipe.output_dir)


@pytest.mark.parametrize("name", ["chat", "dpo"])
def test_filled_rows_lose_what_their_sequences_lose(tmp_path: Path, tiny: Path, name: str) -> None:
    """All of a small file in each step: the loss does not depend on how it lies together."""
    found = {}
    for packing in ("true", "fill"):
        wanted = [*fields(tmp_path, name), f"model={tiny}", f"train.packing={packing}", "train.max_length=512"]
        recipe = load_recipe("tiny_arithmetic", [*wanted, f"data_dir={tmp_path / 'data'}"])
        items = len(make_objective(recipe).load_data(load_tokenizer(str(tiny))))
        wanted += [f"train.global_batch_size={items}", "train.micro_batch_size=1", "train.max_steps=3"]
        found[packing] = losses(run_tiny(tmp_path, tiny, *wanted, f"output_dir={tmp_path / packing}"))
    assert found["fill"] == pytest.approx(found["true"], rel=1e-5)


def test_a_resumed_stream_continues_exactly(tmp_path: Path, tiny: Path) -> None:
    wanted = fields(tmp_path, "chat", "checkpoint.every_steps=3", "optimizer.schedule=constant", streaming=True)
    whole = losses(run_tiny(tmp_path, tiny, *wanted, f"output_dir={tmp_path / 'whole'}"))
    first = run_tiny(tmp_path, tiny, *wanted, f"output_dir={tmp_path / 'parts'}")
    later = sorted((first / "checkpoints").iterdir())[-1]
    for path in later.iterdir():
        path.unlink()
    later.rmdir()
    assert losses(run_tiny(tmp_path, tiny, *wanted, f"output_dir={first}")) == whole


def test_early_stopping_saves_the_best(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What a loss does from step to step differs between CPUs; so it is told here: the best is step 2's.
    told = iter([5.0, 4.0, 3.0, 3.5, 3.25] * 2)
    monkeypatch.setattr(LossValidation, "_loss", lambda self: next(told))
    wanted = fields(tmp_path, "prompt_completion", "evaluate.every_steps=1", "evaluate.early_stopping_patience=2",
                    "evaluate.samples=2", "optimizer.schedule=constant", "train.epochs=30",
                    validation={"size": 8})  # fmt: skip
    folder = run_tiny(tmp_path, tiny, *wanted, "train.max_steps=30", f"output_dir={tmp_path / 'run'}")
    measured = json.loads((folder / "validation.json").read_text())["measured"]
    assert [(entry["step"], entry["loss"]) for entry in measured] == [(0, 5), (1, 4), (2, 3), (3, 3.5), (4, 3.25)]
    assert len(measured[2]["samples"]) == 2 and measured[2]["samples"][0]["prompt"].endswith("is ")
    assert "best validation loss 3.0000 at step 2, from 5.0000 before training" in capsys.readouterr().out
    # The same command again trains no further.
    run_tiny(tmp_path, tiny, *wanted, "train.max_steps=30", f"output_dir={tmp_path / 'run'}")
    assert json.loads((folder / "validation.json").read_text())["measured"] == measured
    two = run_tiny(tmp_path, tiny, *wanted, "train.max_steps=2", f"output_dir={tmp_path / 'two'}")
    saved, same = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, two))
    assert saved.keys() == same.keys() and all(torch.equal(saved[name], same[name]) for name in saved)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.datasets=[{path: a}]"], "task and data: give one of them"),
        (["task=null"], "task and data: give one of them"),
        (["objective.name=dpo"], "objective has no effect on a task"),
        (["evaluate.every_steps=3"], "evaluate.every_steps has no effect on a task"),
        (
            ["task=null", "data.datasets=[{path: a}]", "evaluate.samples=3"],
            "evaluate.samples needs validation examples",
        ),
        (["task=null", "data.datasets=[{path: a}]", "train.held_out=3"], "set data.validation.size"),
        (["task=null", "data={datasets: [{path: a}], streaming: true}", "train.packing=fill"], "a stream's are not"),
        (["task=null", "data.datasets=[{path: a, colums: {}}]"], "data.datasets.0.colums: no such field; did you mean"),
    ],
)
def test_recipes_are_checked(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("tiny_arithmetic", overrides)


def test_what_does_not_fit_is_told_before_a_weight_is_loaded(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"preference pairs; set objective.name=dpo or orpo"):
        run_tiny(tmp_path, tiny, *fields(tmp_path, "dpo")[:2], f"output_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"no preference pairs; set objective.name=sft"):
        run_tiny(tmp_path, tiny, *fields(tmp_path, "chat"), "objective.name=orpo", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"adapter.method = full has none"):
        run_tiny(tmp_path, tiny, *fields(tmp_path, "dpo"), "adapter.method=full", f"output_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
