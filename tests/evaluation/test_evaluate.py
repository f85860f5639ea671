import json

import pytest
import torch

from neuroada.errors import UserError
from neuroada.evaluation.evaluate import TransformersBackend, evaluate_tasks
from neuroada.evaluation.source import resolve_tasks

TASKS = resolve_tasks(["AddSub", "boolq"])


def predictions(out, task: str) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions" / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """The tasks' own lengths would be slow: 16 tokens."""
    plan, generate = TransformersBackend.plan, TransformersBackend.generate
    monkeypatch.setattr(TransformersBackend, "plan", lambda self, lengths, new: plan(self, lengths, 16))
    monkeypatch.setattr(
        TransformersBackend, "generate", lambda self, ids, new, rows, on: generate(self, ids, 16, rows, on)
    )


def evaluate(model, tokenizer, data_dir, out, **options):
    return evaluate_tasks(model, tokenizer, TASKS, data_dir, out, **{"batch_tokens": 600, **options})


def test_files_and_contents(model, tokenizer, data_dir, tmp_path):
    model.train()
    results = evaluate(model, tokenizer, data_dir, tmp_path, names={"model": "tiny", "adapter": None})
    assert model.training
    model.eval()
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["model"] == "tiny" and results["adapter"] is None
    assert results["tasks"]["AddSub"]["n"] == 24 and results["tasks"]["AddSub"]["unseen"]["n"] == 18
    assert results["tasks"]["boolq"]["unseen"] is None
    rows = predictions(tmp_path, "AddSub")
    assert [row["index"] for row in rows] == list(range(24))
    assert [row["seen_in_training"] for row in rows] == [False] * 18 + [True] * 6
    keys = {"index", "prompt", "generation", "gold", "published", "sound", "seen_in_training"}
    assert set(rows[0]) == keys and set(rows[0]["sound"]) == {"answer", "correct"}
    assert "Tom has 3 apples" in rows[3]["prompt"]
    assert len({row["generation"] for row in rows}) > 5
    assert not (tmp_path / "predictions" / ".parts").exists()


def test_a_perfect_model_scores_one(model, tokenizer, data_dir, tmp_path, monkeypatch):
    def right(self, prompts, new, rows, on_finished):
        texts = [tokenizer.decode(ids) for ids in prompts]
        sums = [text.split("Tom has ")[1].split(" apples and buys ") for text in texts if "Tom" in text]
        answers = [f" {int(a) + int(b.split()[0])}." for a, b in sums]
        return [tokenizer(answer)["input_ids"] for answer in answers]

    monkeypatch.setattr(TransformersBackend, "generate", right)
    results = evaluate_tasks(model, tokenizer, TASKS[:1], data_dir, tmp_path, batch_tokens=600)
    assert results["tasks"]["AddSub"]["published"] == results["tasks"]["AddSub"]["sound"] == 1.0


def test_limit_takes_the_first(model, tokenizer, data_dir, tmp_path):
    results = evaluate(model, tokenizer, data_dir, tmp_path, limit=5)
    assert {name: row["n"] for name, row in results["tasks"].items()} == {"AddSub": 5, "boolq": 5}
    assert "Tom has 4 apples" in predictions(tmp_path, "AddSub")[4]["prompt"]


def test_trained_on_decides_what_was_seen(model, tokenizer, data_dir, tmp_path):
    results = evaluate(model, tokenizer, data_dir, tmp_path, limit=3, trained_on="boolq")
    assert results["tasks"]["AddSub"]["unseen"] is None  # boolq's training set is not there


def test_a_prompt_that_does_not_fit_is_counted_and_wrong(model, tokenizer, data_dir, tmp_path, monkeypatch):
    lengths = [len(tokenizer(task.prompt(row))["input_ids"]) for task, row in _addsub(data_dir)]
    context = 512 + sorted(lengths)[-5]
    too_long = [i for i, length in enumerate(lengths) if length + 512 > context]
    assert 0 < len(too_long) < 24
    monkeypatch.setattr(model.config, "max_position_embeddings", context)
    results = evaluate(model, tokenizer, data_dir, tmp_path)
    assert results["tasks"]["AddSub"]["too_long"] == len(too_long) and results["tasks"]["AddSub"]["n"] == 24
    rows = predictions(tmp_path, "AddSub")
    assert [row["index"] for row in rows if "note" in row] == too_long
    assert all(rows[i]["generation"] == "" and not rows[i]["sound"]["correct"] for i in too_long)


def _addsub(data_dir):
    rows = json.loads((data_dir / "AddSub" / "test.json").read_text())
    return [(TASKS[0], row) for row in rows]


class Cut(Exception):
    pass


def cut_off_after(monkeypatch, batches: int) -> list[int]:
    """Make the evaluation die after so many batches; the list that is returned counts them."""
    counted: list[int] = []
    generate = TransformersBackend.generate

    def dying(self, *arguments):
        if len(counted) == batches:
            raise Cut
        counted.append(1)
        return generate(self, *arguments)

    monkeypatch.setattr(TransformersBackend, "generate", dying)
    return counted


def test_resumes_where_it_was_cut_off(model, tokenizer, data_dir, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with monkeypatch.context() as patch:
        all_batches = cut_off_after(patch, 10**6)
        evaluate(model, tokenizer, data_dir, whole, identity="a")
    assert len(all_batches) > 6
    with monkeypatch.context() as patch:
        cut_off_after(patch, 3)
        with pytest.raises(Cut):
            evaluate(model, tokenizer, data_dir, cut, identity="a")
    assert not (cut / "results.json").exists()
    with (cut / "predictions" / ".parts" / "rank0.jsonl").open("a") as file:
        file.write('["AddSub", 99, ["torn')  # killed in the middle of a line
    with monkeypatch.context() as patch:
        cut_off_after(patch, 2)
        with pytest.raises(Cut):
            evaluate(model, tokenizer, data_dir, cut, identity="a")
    with monkeypatch.context() as patch:
        rest = cut_off_after(patch, 10**6)
        evaluate(model, tokenizer, data_dir, cut, identity="a")
    assert len(rest) == len(all_batches) - 3 - 2
    for name in ("results.json", "predictions/AddSub.jsonl", "predictions/boolq.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "change", [{"identity": "b"}, {"limit": 20}, {"batch_tokens": 700}, {"identity": None}, {"dtype": torch.float64}]
)
def test_anything_that_changed_starts_anew(model, tokenizer, data_dir, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        cut_off_after(patch, 3)
        with pytest.raises(Cut):
            evaluate(model, tokenizer, data_dir, tmp_path / "cut", identity="a")
    dtype = change.pop("dtype", torch.float32)
    options = {"identity": "a", **change}
    try:
        model.to(dtype)
        with monkeypatch.context() as patch:
            anew = cut_off_after(patch, 10**6)
            evaluate(model, tokenizer, data_dir, tmp_path / "cut", **options)
            after_a_cut = len(anew)
            evaluate(model, tokenizer, data_dir, tmp_path / "whole", **options)
        assert after_a_cut == len(anew) - after_a_cut
    finally:
        model.to(torch.float32)


def test_nothing_to_evaluate(model, tokenizer, data_dir, tmp_path):
    with pytest.raises(UserError, match="limit: 0"):
        evaluate(model, tokenizer, data_dir, tmp_path, limit=0)
    with pytest.raises(UserError, match="tasks"):
        evaluate_tasks(model, tokenizer, [], data_dir, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_evaluation_adds_to_the_first(model, tokenizer, data_dir, tmp_path):
    options = {"identity": "a", "names": {"model": "m", "adapter": None}, "batch_tokens": 600, "limit": 6}
    first = evaluate_tasks(model, tokenizer, TASKS[:1], data_dir, tmp_path, **options)["tasks"]
    both = evaluate_tasks(model, tokenizer, TASKS[1:], data_dir, tmp_path, **options)["tasks"]
    assert set(both) == {task.name for task in TASKS} and both[TASKS[0].name] == first[TASKS[0].name]
    assert evaluate_tasks(model, tokenizer, TASKS[:1], data_dir, tmp_path, **options)["tasks"] == both


def test_a_score_is_not_replaced_by_one_of_fewer_questions(model, tokenizer, data_dir, tmp_path):
    evaluate(model, tokenizer, data_dir, tmp_path, limit=4, identity="a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="AddSub's score of 4 questions, more than the 1 asked for"):
        evaluate(model, tokenizer, data_dir, tmp_path, limit=1, identity="a")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    more = evaluate(model, tokenizer, data_dir, tmp_path, limit=5, identity="a")
    assert more["tasks"]["AddSub"]["n"] == 5


def test_another_model_s_scores_are_not_replaced(model, tokenizer, data_dir, tmp_path):
    evaluate(model, tokenizer, data_dir, tmp_path, limit=2, names={"model": "first", "adapter": None})
    with pytest.raises(UserError, match="holds the scores of first; give another folder"):
        evaluate(model, tokenizer, data_dir, tmp_path, limit=2, names={"model": "second", "adapter": None})
