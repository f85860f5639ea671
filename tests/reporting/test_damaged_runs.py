"""Reports over files that are not what they were: the right page or one line, whatever stands in them."""

import ast
import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from neuroada.cli import report
from neuroada.comparison.files import read_result
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.registry import METHODS
from neuroada.reporting.card import card
from neuroada.runs.run_folder import RunFolder

VALUES = [None, True, -1, 0, 2.5, 1e308, -1e308, 2**63 - 1, 10**40, "", "x", "3", "../../x", "[red]x", "\x1b[2J",
          [], {}, [None], [[[]]], {"": {}}, {"a": {"b": "c"}}, ["x", "y", "z"]]  # fmt: skip
TEXTS = ["", "null", "3", '"x"', "[]", "{}", "[" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 6000, "NaN",
         '{"tasks": {}, "tasks": {}}', '["\\ud800"]', "\0", "{"]  # fmt: skip
SCORE = {"n": 9, "published": 0.5, "sound": 0.5, "baseline": 0.25, "unseen": {"n": 1, "published": 1.0, "sound": 1.0},
         "interval": {"published": [0.1, 0.9], "sound": [0.1, 0.9]}, "frozen_base": 0.3, "too_long": 0}  # fmt: skip
SOURCE = {"path": "rows.jsonl", "format": "chat", "rows": 9, "sequences": 9, "dropped": {"longer": 1}, "truncated": 1,
          "split": 0, "skipped": 0, "skipped_rows": []}  # fmt: skip
SUMMARY = {"sources": [SOURCE], "sequences": 9, "tokens": 90, "learnt": 40, "p50": 9, "p95": 12, "longest": 13,
           "items": 9, "held_out": 2, "padding": 0.1}  # fmt: skip
SAMPLE = {"prompt": "a", "answer": "b", "expected": "c"}
SPREAD = {"mean": 1.0, "deviation": 0.1, "n": 2}
ROW = {"method": "neuroada:k=4", "lr": 0.1, "tries": {"0.1": 1.0, "1": None}, "at_the_edge": True, "seeds": [1, 2],
       "diverged": 1, "test": SPREAD, "difference": SPREAD, "accuracy": {"AddSub": SPREAD}, "step_seconds": SPREAD,
       "peak_memory_bytes": SPREAD, "saved_bytes": SPREAD, "merged_cost": SPREAD, "trainable": 9,
       "parameters": 99}  # fmt: skip
LINE = {"step": 1, "loss": 1.0, "lr": 0.1, "tokens_per_second": 9.0, "peak_memory_bytes": 9}
RUN = {
    "results.json": {"model": "m", "adapter": "a", "weights": "w", "tasks": {"AddSub": SCORE}},
    "base/results.json": {"model": "m", "tasks": {"AddSub": SCORE}},
    "data.json": {"summary": SUMMARY, "examples": [[["a", False], ["b", True]]]},
    "validation.json": {"measured": [{"step": step, "loss": 1.0, "samples": [SAMPLE]} for step in (0, 2)]},
    "run.json": {"method": "NeuroAda, k = 2", "loss_unit": "nats", "trainable": 9, "parameters": 99, "steps": 2,
                 "strategy": "zero2", "world_size": 2, "code": "1", "started": "now", "device": "CPU", "python": "3",
                 "platform": "Linux", "libraries": {"torch": "2"}},
}  # fmt: skip
COMPARISON = {
    "comparison.json": {"task": "math", "model": "m", "command": "neuroada compare", "device": "CPU",
                        "rows": [ROW, ROW], "base": {"test": 2.0, "accuracy": {"AddSub": SPREAD}}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    load_recipe("llama7b_math", [f"output_dir={tmp_path}"]).save(tmp_path / "recipe.yaml")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({**LINE, "step": step}) + "\n" for step in range(1, 4)))
    (tmp_path / "adapter").mkdir()
    delta = {"base_model.model.model.layers.0.self_attn.q_proj.neuroada_delta": torch.ones(4, 2)}
    save_file(delta, tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) below `value`."""
    if isinstance(value, dict | list):
        for key in [*value] if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damaged(files: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The files with one value replaced or missing, for every place."""
    rng = random.Random(seed)
    for name in files:
        for number in range(len([*places(files[name])])):
            for missing in (False, True):
                changed = copy.deepcopy(files)
                holder, key = [*places(changed[name])][number]
                if missing:
                    del holder[key]
                else:
                    holder[key] = rng.choice(VALUES)
                yield changed


def told(act: Callable[[], object]) -> str:
    """ "" where it went well, else the error's one line; any other error is the test's."""
    try:
        act()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        return str(error)
    return ""


@pytest.mark.parametrize("files", [RUN, COMPARISON], ids=["run", "comparison"])
def test_the_whole_files_make_a_report(folder: Path, files: dict[str, Any]) -> None:
    write(folder, files)
    report.main([str(folder)])
    assert (folder / "report.html").stat().st_size > 5000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite(folder: Path, value: float) -> None:
    delta = {"base_model.model.model.layers.0.self_attn.q_proj.neuroada_delta": torch.full((4, 2), value)}
    save_file(delta, folder / "adapter" / "adapter_model.safetensors")
    assert "the change of model.layers.0.self_attn.q_proj is not finite" in told(lambda: report.main([str(folder)]))


def test_a_recipe_that_is_a_link_out_of_its_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("SECRET")
    (folder / "recipe.yaml").unlink()
    (folder / "recipe.yaml").symlink_to(secret)
    said = told(lambda: report.main([str(folder)]))
    assert "outside its folder" in said and "SECRET" not in said


NAMES = ["a/b", 'a"b', "a'b", "a\nb", 'x")\nimport os #', "$(id)", "[red]x", "漢", "\\", "a/b\u2028c", "{auto}"]


@pytest.mark.parametrize("method", ["neuroada", "lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_the_card_s_snippet_quotes_the_model_s_name(folder: Path, name: str, method: str) -> None:
    """The snippet is copied into a shell's Python: a name in it is one string, whatever it holds."""
    run = RunFolder.read(folder)
    run.recipe.update(model=name)
    text = card(run, METHODS.load(method))
    code = text.split("```python\n")[1].split("\n```\n")[0]
    strings = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert run.model in strings or method == "full"
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) and node.names[0].name == "os"]
    assert not calls
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == run.model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("files", [RUN, COMPARISON], ids=["run", "comparison"])
def test_one_damaged_value(folder: Path, files: dict[str, Any], seed: int) -> None:
    answers = []
    for changed in damaged(files, seed):
        write(folder, changed)
        answers.append(told(lambda: report.main([str(folder)])))
    assert sum(map(bool, answers)) / len(answers) > 0.3


@pytest.mark.parametrize("files", [RUN, COMPARISON], ids=["run", "comparison"])
def test_other_contents(folder: Path, files: dict[str, Any]) -> None:
    for name in [*files, "recipe.yaml", "metrics.jsonl"] if files is RUN else files:
        before = (folder / name).read_text() if (folder / name).exists() else ""
        for text in TEXTS:
            write(folder, files)
            (folder / name).write_text(text)
            said = told(lambda: report.main([str(folder)]))
            assert said or name in ("metrics.jsonl", "validation.json"), (name, text[:20])
        (folder / name).write_text(before)


def test_a_run_that_stopped_before_its_first_validation(folder: Path) -> None:
    write(folder, {"validation.json": {"measured": [{"step": 0, "loss": 1.0}]}})
    report.main([str(folder)])
    assert "Validation loss" in (folder / "report.html").read_text()


def test_a_comparison_s_run_that_logged_nothing(folder: Path) -> None:
    write(folder, COMPARISON)
    run = folder / "runs" / "neuroada-k=4" / "lr-0.1-seed-1"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    report.main([str(folder)])
    (run / "metrics.jsonl").write_text("[1]\n")
    assert "metrics.jsonl, line 1" in told(lambda: report.main([str(folder)]))


def test_results_of_a_comparison_s_runs(tmp_path: Path) -> None:
    whole = {"recipe": {"train": {"seed": 1}, "optimizer": {"lr": 0.1}}, "test": 1.0, "validation": 1.0, "trainable": 1,
             "tasks": {"AddSub": {"sound": 0.5}}, "step_seconds": 1.0, "device": "CPU"}  # fmt: skip
    path = tmp_path / "result.json"
    path.write_text(json.dumps(whole))
    assert read_result(path) == whole
    for changed in damaged({"result.json": whole}, 0):
        write(tmp_path, changed)
        told(lambda: read_result(path))
    for text in TEXTS:
        path.write_text(text)
        assert told(lambda: read_result(path))
