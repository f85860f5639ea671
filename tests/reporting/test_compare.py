"""neuroada compare end to end on a tiny model: what it does, what it skips, what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroada.cli import compare
from neuroada.comparison import general_text, runs
from neuroada.comparison.files import read_summary
from neuroada.comparison.measure import _load, measure
from neuroada.comparison.page import write_comparison
from neuroada.comparison.summary import summarize
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.evaluation.source import Source
from neuroada.objectives import make_objective
from neuroada.sources.tiny import make_tiny
from neuroada.training.trainer import train

GENERAL = "The river rises in the hills, and runs a long way to the sea. " * 9


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compare")
    model = make_tiny(folder / "tiny")
    texts = ({"title": "t", "text": text} for text in (GENERAL, " ", GENERAL[:200]))
    (folder / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return ["--recipe", "tiny_arithmetic", "--methods", "neuroada:k=4", "full@1e-3,1e9", "--lrs", "1e-2,1e-4",
            "--seeds", "1,2", "--validation", "8", "--general-text", str(folder / "articles.jsonl"),
            "--out", str(folder / "out"), f"model={model}",
            f"data_dir={folder / 'data'}", "train.max_steps=4"]  # fmt: skip


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were started: in this process, which saves importing torch in each."""
    started: list[str] = []

    def follow(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, str]:
        if "--measure" in command:
            folder, kind, *text = command[command.index("--measure") + 1 :]
            measure(Path(folder), kind == "base", *text)
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
    assert sparse["merged_cost"]["n"] == sparse["step_seconds"]["n"] == 2  # of both seeds
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

    check_general_text(out, next(one for one in arguments if one.startswith("model=")).removeprefix("model="))
    # A run that scored no text, or another one, is not taken for one that did.
    result = json.loads((base := out / "runs" / "base" / "result.json").read_text())
    of_text = result["recipe"].pop("general_text")
    base.write_text(json.dumps(result))
    with pytest.raises(UserError, match=f"base was run with general_text = None, not {of_text}; choose another folder"):
        compare.main(arguments)

    # Scores that a run gave itself are taken, not repeated.
    run = out / "runs" / "neuroada-k=4" / "lr-0.01-seed-2"
    (run / "results.json").write_text('{"tasks": {"arithmetic": {"sound": 0.5}}}')
    measure(run, False)
    assert json.loads((run / "result.json").read_text())["tasks"]["arithmetic"]["sound"] == 0.5


def check_general_text(out: Path, model: str) -> None:
    """Scored by the base once and by every run: as transformers gives it for the saved adapter, merged by PEFT."""
    summary = json.loads((out / "comparison.json").read_text())
    base, (sparse, full) = summary["base"]["general_text"], summary["rows"]
    tokens = len(GENERAL) - 1 + 199  # one a byte; a text's first is not predicted
    assert base["tokens"] == tokens
    tokenizer = AutoTokenizer.from_pretrained(model)
    pieces = [GENERAL[:256], GENERAL[255:511], GENERAL[510:], GENERAL[:200]]  # a window repeats the last token

    def expected(loaded: torch.nn.Module) -> float:
        total = 0.0
        for ids in [tokenizer(piece, return_tensors="pt").input_ids for piece in pieces]:
            with torch.inference_mode():
                total += loaded(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        return total / tokens

    def loaded() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    assert base["loss"] == pytest.approx(expected(loaded()), rel=1e-5)
    adapters = [out / "runs" / "neuroada-k=4" / f"lr-0.01-seed-{seed}" / "adapter" for seed in (1, 2)]
    after = [expected(PeftModel.from_pretrained(loaded(), adapter).merge_and_unload()) for adapter in adapters]
    assert sparse["general_text"]["n"] == full["general_text"]["n"] == 2
    assert sparse["general_text"]["mean"] == pytest.approx(sum(after) / 2, rel=1e-5)
    assert sparse["forgetting"]["mean"] == pytest.approx(sum(after) / 2 - base["loss"], abs=1e-5)
    assert sparse["forgetting"]["mean"] != full["forgetting"]["mean"]

    report = (out / "report.html").read_text()
    shown = ["general text</th>", "forgetting</th>", f"{base['loss']:.4f}", f"{tokens:,} tokens",
             *(f"{row['forgetting']['mean']:+.4f} ± " for row in (sparse, full))]  # fmt: skip
    assert [one for one in shown if one not in report] == []
    write_comparison(out, read_summary(out / "comparison.json"))  # as `neuroada report` does
    assert (out / "report.html").read_text() == report


def test_windows_of_general_text_end_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_text, "TOKENS", 20)
    file = tmp_path / "general.txt"
    file.write_text("abcdefghijklmnopqrstuvwxyz" * 2)
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(tmp_path / "tiny"))
    found = general_text.windows(str(file), tokenizer, 16)
    assert [tokenizer.decode(one.ids) for one in found] == ["abcdefghijklmnop", "pqrstu"]
    assert [int(one.learnt.sum()) for one in found] == [15, 5]


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


def test_preferences(arguments: list[str], children: list[str], tmp_path: Path) -> None:
    """DPO, whole: the base prefers nothing. A method without a reference is told before anything runs."""
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(24)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model, out = arguments[-3], tmp_path / "out"
    own = ["--recipe", "tiny_arithmetic", "--lrs", "1e-2", "--out", str(out), model, f"data_dir={tmp_path}",
           "train.max_steps=3", "task=null", "engine.name=single", "objective.name=dpo", "data.validation.size=8",
           f"data.datasets=[{{path: {rows}}}]"]  # fmt: skip
    with pytest.raises(UserError, match=r"adapter\.method = masked has none"):
        compare.main([*own[:2], "--methods", "neuroada:k=4", "masked:k=4", *own[2:]])
    assert children == []
    compare.main([*own[:2], "--methods", "neuroada:k=4", "lora:rank=2", *own[2:]])
    summary = json.loads((out / "comparison.json").read_text())
    assert summary["base"]["test"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(row["test"]["mean"] < math.log(2) - 1e-4 for row in summary["rows"]) and len(summary["rows"]) == 2


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


def test_wrong_general_text_is_refused_before_anything_runs(
    arguments: list[str], children: list[str], tmp_path: Path
) -> None:
    def said(file: Path, given: list[str] = arguments) -> str:
        with pytest.raises(UserError) as error:
            compare.main([*given, "--general-text", str(file)])
        assert "\n" not in str(error.value) and "--general-text" in str(error.value)
        return str(error.value)

    blank, rows = tmp_path / "blank.txt", tmp_path / "rows.jsonl"
    blank.write_text(" \n")
    rows.write_text('{"text": "one"}\n{"content": "two"}\n')
    assert "no such file" in said(tmp_path / "none.txt")
    assert "no text of two tokens" in said(blank)
    assert "rows.jsonl, row 2: text is null" in said(rows)
    glue = ["--recipe", "minilm_sst2", "--methods", "neuroada:k=4@1e-2", "--out", str(tmp_path / "out")]
    assert "a classifier of glue/sst2 gives no loss" in said(rows, glue)
    assert children == []


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
    assert (row["seeds"], row["losses"]) == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert row["test"] == {"mean": 2.0, "deviation": 1.0, "n": 3}
    assert row["accuracy"]["t"]["mean"] == pytest.approx(0.2)
    assert row["at_the_edge"]
    assert first["difference"] is None
    assert row["difference"] == pytest.approx({"mean": (0.5 + 0.25 + 1.0) / 3, "deviation": 0.381881, "n": 3})
    write_comparison(tmp_path, summary)
    report = (tmp_path / "report.html").read_text()
    assert "2.0000 ± 1.0000" in report and "+0.5833 ± 0.3819" in report and "less neuroada&#x27;s" in report
    assert "held-out loss</th>" in report and "merged cost</th>" not in report  # not measured: no column
    assert "general" not in json.dumps(summary) + report.casefold() and "forgetting" not in report.casefold()

    first, row = summarize(tmp_path, chosen, [1, 4], task="t", model="m", command="c")["rows"]
    assert (first["seeds"], first["diverged"], row["seeds"]) == ([1], 1, [1, 4])
    assert row["difference"] == {"mean": 0.5, "deviation": 0.0, "n": 1}
