"""Tasks written in YAML: every rule, log-likelihoods against plain transformers, and mistakes in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from test_launch_evaluate import launch

from neuroada.data.task_file import load_task
from neuroada.errors import UserError
from neuroada.evaluation.evaluate import TransformersBackend, evaluate_tasks
from neuroada.evaluation.questions import encode_options
from neuroada.evaluation.source import resolve_tasks
from neuroada.tasks.table import get_task

CAPITALS = [
    {"country": "France", "capital": "Paris", "choices": ["Paris", "Lyon and Nice", "Rome"], "right": 0},
    {"country": "Peru", "capital": "Lima", "choices": ["Cusco", "Lima"], "right": 1},
    {"country": "the United States of America", "capital": "Washington",
     "choices": ["New York", "Los Angeles", "Chicago", "Washington"], "right": 3},
    {"country": "Chad", "capital": "N'Djamena", "choices": ["Moundou", "N'Djamena", "Abéché"], "right": 1},
    {"country": "Japan", "capital": "Tokyo", "choices": ["Kyoto", "Tokyo", "Osaka"], "right": 1},
]  # fmt: skip
PROMPT = "What is the capital of {country}? Answer: "


@pytest.fixture
def write(tmp_path: Path):
    """Writes rows and a task file over them; returns the task file's path."""

    def write(file: str = "capitals", rows: list | None = None, **fields: object) -> str:
        data = tmp_path / f"{file}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in (CAPITALS if rows is None else rows)))
        spec = {"path": str(data), "prompt": PROMPT, "target": "{capital}", "answer": "exact", **fields}
        path = tmp_path / f"{file}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in spec.items() if value is not None}))
        return str(path)

    return write


def choice(**more: object) -> dict[str, object]:
    return {"rule": "multiple_choice", "options": "choices", **more}


def predictions(out: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions" / f"{task}.jsonl").read_text().splitlines()]


def evaluate(model, tokenizer, path: str, out: Path, **options) -> dict:
    return evaluate_tasks(model, tokenizer, [load_task(path)], "nowhere", out, **options)


# ---- multiple choice


def plain(model, tokenizer, prompt: str, option: str) -> tuple[float, int]:
    """The textbook: one sequence, no padding; the blank at the prompt's end belongs to the option."""
    head = tokenizer(prompt.rstrip())["input_ids"]
    whole = tokenizer(prompt + option)["input_ids"]
    assert whole[: len(head)] == head
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, whole[i]]) for i in range(len(head), len(whole))), len(whole) - len(head)


@pytest.mark.parametrize("batch_tokens", [1, 130, 100_000])
@pytest.mark.parametrize("length_normalised", [False, True])
def test_log_likelihoods_are_those_of_plain_transformers(
    model, tokenizer, write, tmp_path, batch_tokens, length_normalised
):
    path = write(answer=choice(length_normalised=length_normalised))
    results = evaluate(model, tokenizer, path, tmp_path / "out", batch_tokens=batch_tokens)
    found = predictions(tmp_path / "out", "capitals")
    assert len(found) == len(CAPITALS)
    for row, got in zip(CAPITALS, found, strict=True):
        pairs = [plain(model, tokenizer, PROMPT.format(**row), option) for option in row["choices"]]
        assert got["log_likelihoods"] == pytest.approx([total for total, _ in pairs], abs=1e-4)
        assert got["option_tokens"] == [count for _, count in pairs]
        scores = [total / count if length_normalised else total for total, count in pairs]
        best = row["choices"][scores.index(max(scores))]
        assert got["generation"] == best and got["gold"] == row["capital"]
        assert got["sound"] == got["published"] == {"answer": best, "correct": best == row["capital"]}
    entry = results["tasks"]["capitals"]
    assert entry["sound"] == sum(one["sound"]["correct"] for one in found) / len(found)
    assert entry["baseline"] == pytest.approx(sum(1 / len(row["choices"]) for row in CAPITALS) / len(CAPITALS))
    assert entry["unseen"] is None and results["averages"] == {}


def test_the_two_scores_differ(model, tokenizer, write, tmp_path):
    chosen = []
    for normalised in (False, True):
        path = write(answer=choice(length_normalised=normalised))
        evaluate(model, tokenizer, path, tmp_path / str(normalised))
        chosen.append([one["generation"] for one in predictions(tmp_path / str(normalised), "capitals")])
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
    ("target_is", "write_target"),
    [
        ("text", lambda row: row["capital"]),
        ("index", lambda row: row["right"]),
        ("number", lambda row: row["right"] + 1),
        ("letter", lambda row: "abcd"[row["right"]]),
    ],
)
def test_how_a_target_names_its_option(write, target_is, write_target):
    rows = [row | {"gold": write_target(row)} for row in CAPITALS]
    task = load_task(write(rows=rows, target="{gold}", answer=choice(target_is=target_is)))
    assert [example["answer"] for example in task.generate("test")] == [row["capital"] for row in CAPITALS]


def test_a_question_that_does_not_fit_is_counted_and_wrong(model, tokenizer, write, tmp_path, monkeypatch):
    task = load_task(write(answer=choice()))
    examples = task.generate("test")
    sequences = encode_options(
        [one["prompt"] for one in examples], [one["options"] for one in examples], tokenizer, "capitals"
    )
    longest = [max(len(ids) for ids, _ in of) for of in sequences]
    monkeypatch.setattr(model.config, "max_position_embeddings", sorted(longest)[-2])
    results = evaluate_tasks(model, tokenizer, [task], "nowhere", tmp_path / "out")
    assert results["tasks"]["capitals"]["too_long"] == 1
    (wrong,) = [one for one in predictions(tmp_path / "out", "capitals") if "note" in one]
    assert wrong["index"] == longest.index(max(longest)) and wrong["log_likelihoods"] is None
    assert wrong["sound"] == {"answer": None, "correct": False}


# ---- answers that are generated

SAID = [" Paris\n", "It is Lima.", "answer is Washington, and so on", "", "answer is Kyoto"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("exact", [True, False, False, False, False]),
        ("contains", [True, True, True, False, False]),
        ({"rule": "regex", "pattern": r"(?:is |^ )(\w+)"}, [True, True, True, False, False]),
    ],
)
def test_rules_of_texts(model, tokenizer, write, tmp_path, monkeypatch, answer, right):
    said = {f"What is the capital of {row['country']}? Answer:": text for row, text in zip(CAPITALS, SAID, strict=True)}

    def generate(self, prompts, new, rows, on_finished):
        assert new == 7
        return [tokenizer(said[tokenizer.decode(ids).rstrip()])["input_ids"] for ids in prompts]

    monkeypatch.setattr(TransformersBackend, "generate", generate)
    results = evaluate(model, tokenizer, write(answer=answer, max_new_tokens=7), tmp_path / "out")
    found = predictions(tmp_path / "out", "capitals")
    assert [one["sound"]["correct"] for one in found] == right
    assert results["tasks"]["capitals"]["sound"] == results["tasks"]["capitals"]["published"] == sum(right) / 5


def test_numbers(write):
    rows = [{"a": 3, "b": 4.5, "sum": "7.5"}, {"a": 1, "b": 2, "sum": 3}]
    task = load_task(write(rows=rows, prompt="{a} + {b} = {{?}}", target="{sum}", answer="number"))
    examples = task.generate("test")
    assert [one["prompt"] for one in examples] == ["3 + 4.5 = {?}", "1 + 2 = {?}"]
    assert task.sound("so 3 + 4.5 is 7.50 and", examples[0]["answer"]).correct
    assert not task.sound("no idea", examples[1]["answer"]).correct


# ---- several at once, on ranks, and at the end of a run


def test_a_changed_file_is_another_task(model, tokenizer, write, tmp_path):
    score = {"model": "m", "adapter": None}
    first = evaluate(model, tokenizer, write(answer=choice()), tmp_path / "out", names=score, identity="a")
    path = write(rows=CAPITALS[:3], answer=choice())
    second = evaluate(model, tokenizer, path, tmp_path / "out", names=score, identity="a")
    assert (first["tasks"]["capitals"]["n"], second["tasks"]["capitals"]["n"]) == (5, 3)
    with pytest.raises(UserError, match="holds capitals's score of 3 questions"):
        evaluate(model, tokenizer, path, tmp_path / "out", names=score, identity="a", limit=2)
    other = evaluate_tasks(
        model, tokenizer, [load_task(write("more", answer=choice()))], "nowhere", tmp_path / "out", names=score,
        identity="a",
    )  # fmt: skip
    assert list(other["tasks"]) == ["capitals", "more"]


def test_any_number_of_ranks_gives_the_same_bytes(model_dir, data_dir, write, tmp_path):
    tasks = f"boolq,{write(answer=choice())},{write('said', answer='contains', max_new_tokens=5)}"
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        launch("--model", model_dir, "--tasks", tasks, "--data-dir", data_dir, "--limit", 4, "--batch-tokens", 200,
               "--out", out, ranks=ranks)  # fmt: skip
        names = [f"predictions/{name}.jsonl" for name in ("boolq", "capitals", "said")]
        found.append([(out / name).read_bytes() for name in (*names, "results.json")])
    assert found[0] == found[1]
    assert list(json.loads(found[0][-1])["tasks"]) == ["boolq", "capitals", "said"]


def test_a_run_on_own_data_is_scored_at_its_end(tmp_path, write):
    from neuroada.cli.train import main
    from neuroada.sources.tiny import make_tiny

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} ", "completion": f"{i + 1}"}) + "\n" for i in range(16)))
    tasks = [write(answer=choice()), write("said", max_new_tokens=3)]
    main(["--recipe", "tiny_arithmetic", f"model={make_tiny(tmp_path / 'tiny')}", "task=null",
          f"data.datasets=[{{path: {rows}}}]", f"data_dir={tmp_path}", "engine.name=single", "train.max_steps=2",
          f"evaluate.tasks={json.dumps(tasks)}", f"output_dir={tmp_path / 'run'}"])  # fmt: skip
    found = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert {name: entry["n"] for name, entry in found.items()} == {"capitals": 5, "said": 5}
    assert "capitals" in (tmp_path / "run" / "report.html").read_text()


# ---- mistakes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": "exakt"}, r"capitals.yaml: answer.rule = 'exakt': input should be 'exact', "),
        ({"answer": {"rule": "regex"}}, r"answer.pattern: is of rule: regex, which needs it"),
        ({"answer": {"rule": "regex", "pattern": "("}}, r"answer.pattern = '\(': no regular expression"),
        ({"answer": {"rule": "regex", "pattern": "a"}}, r"has 0 groups"),
        ({"answer": "multiple_choice"}, r"answer.options: is of rule: multiple_choice, which needs it"),
        ({"answer": {"rule": "exact", "options": "choices"}}, r"answer.options: is of rule: multiple_choice"),
        ({"answer": {"rule": "exact", "length_normalised": True}}, r"answer.length_normalised has no effect"),
        ({"answer": choice(), "max_new_tokens": 3}, r"max_new_tokens has no effect on rule: multiple_choice"),
        ({"promt": "x"}, r"promt: no such field; did you mean prompt\?"),
        ({"target": None}, r"capitals.yaml: target: missing"),
        ({"prompt": "Hello"}, r"capitals.yaml: prompt: names no column"),
        ({"prompt": "{country"}, r"capitals.yaml: prompt: '\{' at character 1"),
        ({"prompt": "{nation}"}, r"capitals.jsonl, row 1: column 'nation' is missing; the row has country, capital, "),
        ({"prompt": "{choices}"}, r"row 1: column 'choices' is \['Paris'.*, expected a text or a number"),
        ({"answer": "number"}, r"capitals.jsonl, row 1: the target is 'Paris', expected a number"),
        ({"answer": choice(), "target": "{right}"}, r"the target is '0', none of \['Paris'.*set answer.target_is"),
        ({"answer": choice(target_is="letter")}, r"row 1: the target is 'Paris', expected the letter of one of 3"),
        ({"answer": choice(target_is="number"), "target": "{right}"}, r"row 1: the target is '0', expected the number"),
        ({"answer": choice(options="country")}, r"column 'country' is 'France', expected a list of at least two"),
        ({"path": "nowhere/rows.jsonl"}, r"capitals.yaml: path: nowhere/rows.jsonl: no such file or folder"),
        ({"split": "test"}, r"capitals.yaml: path: .*split 'test' does not exist, a file has no splits"),
        ({"name": "boolq"}, r"name = 'boolq': is a built-in task's"),
        ({"name": "a/b"}, r"name = 'a/b': string should match pattern"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(write, fields, said):
    with pytest.raises(UserError, match=said) as error:
        resolve_tasks([write(**fields)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["a"]}, r"row 2: column 'choices' is \['a'\], expected a list of at least two texts"),
        ({"choices": ["a", 1]}, r"row 2: column 'choices' is \['a', 1\], expected a list"),
        ({"choices": ["Paris", " "]}, r"row 2: column 'choices' holds an empty option"),
        ({"choices": ["Paris", "b", "Paris"]}, r"row 2: column 'choices' holds 'Paris' twice"),
        ({"capital": " "}, r"row 2: the target is empty"),
        ({"country": None}, r"row 2: column 'country' is None, expected a text or a number"),
    ],
)
def test_a_wrong_row_is_one_line(write, row, said):
    with pytest.raises(UserError, match=said):
        load_task(write(rows=[CAPITALS[0], CAPITALS[0] | row], answer=choice()))


def test_other_mistakes(write, tmp_path):
    path = write()
    Path(path).with_suffix(".jsonl").write_text('{"country": "France"\n')
    with pytest.raises(UserError, match=r"capitals.jsonl, row 1: not JSON .* \(task file .*capitals.yaml\)"):
        load_task(path)
    Path(path).with_suffix(".jsonl").write_text("")
    with pytest.raises(UserError, match="holds no row"):
        load_task(path)
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file or folder; give a task file, or a task's name"):
        resolve_tasks(["nowhere.yaml"])
    with pytest.raises(UserError, match=r"is a task called capitals, and there is another; set its name"):
        resolve_tasks([write(), write("other", name="capitals")])
    with pytest.raises(UserError, match=r"task = mine.yaml: a task file is for evaluate.tasks"):
        get_task("mine.yaml")


def test_a_mistake_is_told_before_a_model_is_loaded(write, tmp_path, model_dir):
    path = write(prompt="{nation}")
    result = launch("--model", model_dir, "--tasks", path, cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "row 1: column 'nation' is missing" in result.stderr


def test_folders_have_splits(write, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps(CAPITALS[0]) + "\n")
    (folder / "validation.jsonl").write_text((json.dumps(CAPITALS[1]) + "\n") * 2)
    assert len(load_task(write(path=str(folder))).generate("test")) == 1
    assert len(load_task(write(path=str(folder), split="validation")).generate("test")) == 2
    several = [str(folder / "test.jsonl"), str(folder / "*.jsonl")]
    assert len(load_task(write(path=several)).generate("test")) == 1 + 3
