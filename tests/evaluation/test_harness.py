"""Tasks of lm-evaluation-harness in results.json: the library's own numbers, beside our tasks."""

import json
import random
import sys
from pathlib import Path

import pytest
from harness_task import FEW_SHOT, GENERATED, TASK
from test_launch_evaluate import launch

from neuroada.errors import UserError
from neuroada.evaluation.evaluate import evaluate_tasks
from neuroada.evaluation.generate import generate
from neuroada.evaluation.harness_requests import deal
from neuroada.evaluation.source import resolve_tasks

OWN = """
name: own
path: {data}
prompt: "{{question}} "
target: "{{answer}}"
answer: {{rule: multiple_choice, options: choices, target_is: index}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Forty sums with two to four answers to choose from, for lm_eval and for a task file over the same rows."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-dev.txt")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    rows = []
    for i in range(40):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        choices = [str(a + b + shift) for shift in draw.sample([0, 1, 2, 3], 4)]
        choices = choices if i % 3 else [str(a + b), str(a + b + 5)]
        rows.append({"question": f"{a} + {b} =", "choices": choices, "answer": choices.index(str(a + b))})
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data, metrics="[{metric: acc}, {metric: acc_norm}]"))
    (tmp_path / "own.yaml").write_text(OWN.format(data=data))
    return tmp_path


def test_it_scores_what_our_own_log_likelihoods_score(model, tokenizer, data_dir, folder):
    tasks = resolve_tasks([f"lm_eval:{folder / 'sums.yaml'}", str(folder / "own.yaml")])
    assert [task.name for task in tasks] == ["lm_eval:sums", "own"]
    names = {"model": "tiny", "adapter": None}
    results = evaluate_tasks(model, tokenizer, tasks, data_dir, folder / "out", names=names, identity="a")
    assert results == json.loads((folder / "out" / "results.json").read_text())
    theirs, own = results["tasks"]["lm_eval:sums"], results["tasks"]["own"]
    for field in ("n", "sound", "published", "interval", "unseen", "too_long"):
        assert theirs[field] == own[field], field
    assert theirs["baseline"] == pytest.approx(own["baseline"])
    assert 0 < theirs["sound"] < 1 and theirs["n"] == 40 and theirs["metric"] == "acc,none"
    assert theirs["metrics"].keys() == {"acc,none", "acc_norm,none"}
    # The first ten alone would lose a score of forty; in another folder they are scored.
    with pytest.raises(UserError, match="holds lm_eval:sums's score of 40 questions"):
        evaluate_tasks(model, tokenizer, tasks[:1], data_dir, folder / "out", names=names, identity="a", limit=10)
    ten = evaluate_tasks(model, tokenizer, tasks[:1], data_dir, folder / "ten", names=names, limit=10)
    assert ten["tasks"]["lm_eval:sums"]["n"] == 10


def test_ranks_share_the_requests_and_score_the_same(model, tokenizer, model_dir, data_dir, folder):
    """Few-shot examples too, which the library's own division would draw anew on every rank."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    prompts = [tokenizer(row["question"])["input_ids"] for row in rows]
    says = [tokenizer.decode(ids) for ids in generate(model, prompts, 3, {tokenizer.eos_token_id}, 8)]
    rows = [row | {"said": text if i % 2 else "no"} for i, (row, text) in enumerate(zip(rows, says, strict=True))]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("shown", FEW_SHOT), ("said", GENERATED)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "test.jsonl"))
    tasks = [f"lm_eval:{folder / name}.yaml" for name in ("sums", "shown", "said")]
    alone = evaluate_tasks(model, tokenizer, resolve_tasks(tasks), data_dir, folder / "alone")["tasks"]
    launch("--model", model_dir, "--tasks", ",".join(tasks), "--out", folder / "two", ranks=2)
    together = json.loads((folder / "two" / "results.json").read_text())["tasks"]
    assert list(together) == ["lm_eval:sums", "lm_eval:shown", "lm_eval:said"]
    assert together == alone
    assert all(0 < entry["sound"] < 1 for entry in alone.values())


def test_requests_are_dealt_by_context():
    asked = [("a" * (1 + i // 2), f" {i}") for i in range(10)]
    shares = deal(asked, 2)
    assert shares == [[8, 9, 4, 5, 0, 1], [6, 7, 2, 3]]
    assert deal(asked[:2], 3) == [[0, 1], [], []]


def test_what_cannot_be_scored_is_one_line(folder):
    with pytest.raises(UserError, match=r"lm_eval:no_such_task: lm_eval has no such task.* lists them"):
        resolve_tasks(["lm_eval:no_such_task"])
    with pytest.raises(UserError, match=r"lm_eval:.*/broken.yaml: lm_eval cannot load it"):
        (folder / "broken.yaml").write_text(
            "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: no}}\n"
        )
        resolve_tasks([f"lm_eval:{folder / 'broken.yaml'}"])
    (folder / "odd.yaml").write_text(
        TASK.format(data=folder / "test.jsonl", metrics="[{metric: brier_score, higher_is_better: false}]")
    )
    with pytest.raises(UserError, match=r"lm_eval:.*odd.yaml: its metrics are brier_score, no accuracy"):
        resolve_tasks([f"lm_eval:{folder / 'odd.yaml'}"])


def test_without_the_library(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        UserError, match=r"lm_eval:arc_easy: lm-evaluation-harness is not installed; pip install lm_eval"
    ):
        resolve_tasks(["lm_eval:arc_easy"])
