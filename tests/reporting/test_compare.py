"""neuroada compare end to end on a tiny model: what it does, what it skips, what it refuses."""

import json
import math
from pathlib import Path

import pytest

from neuroada.cli import compare
from neuroada.comparison import runs
from neuroada.comparison.measure import _load, measure
from neuroada.comparison.page import write_comparison
from neuroada.comparison.summary import summarize
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.evaluation.source import Source
from neuroada.objectives import make_objective
from neuroada.sources.tiny import make_tiny
from neuroada.training.trainer import train


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compare")
    model = make_tiny(folder / "tiny")
    return ["--recipe", "tiny_arithmetic", "--methods", "neuroada:k=4", "full@1e-3,1e9", "--lrs", "1e-2,1e-4",
            "--seeds", "1,2", "--validation", "8", "--out", str(folder / "out"), f"model={model}",
            f"data_dir={folder / 'data'}", "train.max_steps=4"]  # fmt: skip


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were started: in this process, which saves importing torch in each."""
    started: list[str] = []

    def follow(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, str]:
        if "--measure" in command:
            measure(Path(command[-2]), command[-1] == "base")
        else:
            recipe = load_recipe(command[-1])
            started.append("/".join(Path(recipe.output_dir).parts[-2:]))
            try:
                train(recipe)
            except UserError as error:
                return 2, f"error: {error}\n"
        return 0, ""

    monkeypatch.setattr(runs, "follow", follow)
    return started


def test_it_compares_resumes_and_refuses(arguments: list[str], children: list[str]) -> None:
    out = Path(arguments[arguments.index("--out") + 1])
    compare.main(arguments)
    assert children == [
        "neuroada-k=4/lr-0.01-seed-1",
        "neuroada-k=4/lr-0.0001-seed-1",
        "neuroada-k=4/lr-0.01-seed-2",
        "full/lr-0.001-seed-1",
        "full/lr-1e+09-seed-1",
        "full/lr-0.001-seed-2",
    ]
    summary = json.loads((out / "comparison.json").read_text())
    sparse, full = summary["rows"]
    assert (sparse["lr"], full["lr"]) == (0.01, 0.001)
    tries = sparse["tries"]
    assert tries["0.01"] < tries["0.0001"]
    assert full["tries"]["1e+09"] is None or full["tries"]["1e+09"] > full["tries"]["0.001"]
    assert full["test"]["mean"] < summary["base"]["test"]
    assert sparse["test"]["n"] == 2 and sparse["test"]["deviation"] > 0
    assert sparse["trainable"] == 4 * 1024 and full["trainable"] == full["parameters"]
    assert full["saved_bytes"]["mean"] > 4 * full["parameters"] > 10 * sparse["saved_bytes"]["mean"]
    assert 0.2 < sparse["merged_cost"]["mean"] < 5 and sparse["step_seconds"]["mean"] > 0
    report = (out / "report.html").read_text()
    for told in ("neuroada:k=4", f"{sparse['test']['mean']:.4f}", f"{full['trainable']:,}", "✓"):
        assert told in report
    assert str(out.parent) not in report
    assert not (out / "runs" / "full" / "lr-0.001-seed-1" / "model").exists()

    children.clear()
    compare.main(arguments)
    assert children == []
    (out / "runs" / "full" / "lr-0.001-seed-2" / "result.json").unlink()
    compare.main(arguments)
    assert children == ["full/lr-0.001-seed-2"]
    with pytest.raises(UserError, match="choose another folder"):
        compare.main([*arguments, "train.max_length=200"])

    # Scores that a run gave itself are taken, not repeated.
    run = out / "runs" / "neuroada-k=4" / "lr-0.01-seed-2"
    (run / "results.json").write_text('{"tasks": {"arithmetic": {"sound": 0.5}}}')
    measure(run, False)
    assert json.loads((run / "result.json").read_text())["tasks"]["arithmetic"]["sound"] == 0.5


def refused(arguments: list[str], **changes: list[str]) -> str:
    """The message when an option's values are replaced."""
    changed = [*arguments]
    for option, values in changes.items():
        at = changed.index(f"--{option}") + 1
        end = next(i for i in range(at, len(changed)) if changed[i].startswith("--"))
        changed[at:end] = values
    with pytest.raises(UserError) as error:
        compare.main(changed)
    return str(error.value)


def test_wrong_arguments_are_refused_before_anything_runs(arguments: list[str], children: list[str]) -> None:
    assert "as many learning rates" in refused(arguments, methods=["neuroada:k=4", "full@1e-3"])
    assert "names a method twice" in refused(arguments, methods=["full", "full"])
    assert "numbers with commas" in refused(arguments, lrs=["high"])
    assert "adapter.kk" in refused(arguments, methods=["neuroada:kk=4"])
    assert "--validation 0" in refused(arguments, validation=["0"])
    assert children == []


def test_own_data_by_its_validation_loss(arguments: list[str], children: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} ", "completion": f"{i % 3}"}) + "\n" for i in range(24)))
    model, out = arguments[-3], tmp_path / "out"
    own = ["--recipe", "tiny_arithmetic", "--methods", "neuroada:k=4", "lora:rank=1", "--lrs", "1e-2,1e-6", "--out",
           str(out), model, f"data_dir={tmp_path}", "train.max_steps=3", "task=null", "engine.name=single",
           f"data.datasets=[{{path: {rows}}}]"]  # fmt: skip
    with pytest.raises(UserError, match=r"has no examples to choose the learning rate by; set data.validation.size"):
        compare.main(own)
    own += ["data.validation.size=8"]
    with pytest.raises(UserError, match=r"--validation 8: is of tasks; over own data set data.validation.size"):
        compare.main([*own[:2], "--validation", "8", *own[2:]])
    compare.main(own)
    assert len(children) == 4
    summary = json.loads((out / "comparison.json").read_text())
    for row in summary["rows"]:
        assert row["lr"] == 0.01 and row["tries"]["0.01"] == row["test"]["mean"] < summary["base"]["test"]
    run = out / "runs" / "neuroada-k=4" / "lr-0.01-seed-42"
    measured = json.loads((run / "validation.json").read_text())["measured"]
    assert measured[0]["step"] == 0 and measured[0]["loss"] == pytest.approx(summary["base"]["test"], rel=1e-5)
    assert min(one["loss"] for one in measured[1:]) == summary["rows"][0]["test"]["mean"]
    report = (out / "report.html").read_text()
    assert "nats per learnt token, of validation examples that no run trained on" in report


def test_an_untrained_model_is_its_own_reference(arguments: list[str], tmp_path: Path) -> None:
    """DPO's loss of the base, to compare with: ln 2."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} ", "chosen": "yes", "rejected": f"{i}"}) + "\n" for i in range(12))
    )
    own = ["task=null", f"data.datasets=[{{path: {rows}}}]", "data.validation.size=5", "objective.name=dpo"]
    recipe = load_recipe("tiny_arithmetic", [arguments[-3], f"data_dir={tmp_path}", f"output_dir={tmp_path}", *own])
    found = make_objective(recipe).compared_losses({}, lambda: _load(Source(recipe.model)))
    assert found == {"validation": None, "test": pytest.approx(math.log(2))}


def test_spreads_and_differences_are_of_seeds(tmp_path: Path) -> None:
    """Sample deviations; differences seed by seed, of the seeds that both methods ended."""
    losses = {"neuroada": {1: 0.5, 2: 1.75, 3: 2.0}, "full": {1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0}}
    for method, by_seed in losses.items():
        for seed, loss in by_seed.items():
            folder = tmp_path / "runs" / method / f"lr-0.1-seed-{seed}"
            folder.mkdir(parents=True)
            recipe = {"optimizer": {"lr": 0.1}, "train": {"seed": seed}}
            result = {"recipe": recipe, "test": loss, "validation": loss, "tasks": {"t": {"sound": loss / 10}}}
            (folder / "result.json").write_text(json.dumps(result))
    diverged = tmp_path / "runs" / "neuroada" / "lr-0.1-seed-4"
    diverged.mkdir()
    recipe = {"optimizer": {"lr": 0.1}, "train": {"seed": 4}}
    (diverged / "result.json").write_text(json.dumps({"recipe": recipe, "diverged": "so it did", "validation": None}))
    tried = {"lr": 0.1, "tries": {"0.01": 2.0, "0.1": 1.0}}
    chosen = {"neuroada": tried, "full": tried}

    summary = summarize(tmp_path, chosen, [1, 2, 3], task="t", model="m", command="c")
    first, row = summary["rows"]
    assert row["test"] == {"mean": 2.0, "deviation": 1.0, "n": 3}
    assert row["accuracy"]["t"]["mean"] == pytest.approx(0.2)
    assert row["at_the_edge"]
    assert first["difference"] is None
    assert row["difference"] == pytest.approx({"mean": (0.5 + 0.25 + 1.0) / 3, "deviation": 0.381881, "n": 3})
    write_comparison(tmp_path, summary)
    report = (tmp_path / "report.html").read_text()
    assert "2.0000 ± 1.0000" in report and "+0.5833 ± 0.3819" in report and "less neuroada&#x27;s" in report
    assert "held-out loss</th>" in report and "merged cost</th>" not in report  # not measured: no column

    first, row = summarize(tmp_path, chosen, [1, 4], task="t", model="m", command="c")["rows"]
    assert (first["seeds"], first["diverged"], row["seeds"]) == ([1], 1, [1, 4])
    assert row["difference"] == {"mean": 0.5, "deviation": 0.0, "n": 1}
