"""launch/check_data.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "check_data.py"


def check_data(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, env={"COLUMNS": "120"}
    )


def write(folder, name, split, questions, answer="true"):
    rows = [
        {"instruction": q, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        for q in questions
    ]
    path = folder / name / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path):
    write(tmp_path, "boolq", "train", ["Is it 1?", "is it 1", "Is it 2?"])
    write(tmp_path, "boolq", "test", ["IS IT 1 ?", "Is it 3?"])
    return tmp_path


def test_json(data_dir):
    done = check_data("--data-dir", data_dir, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(f["set"], f["split"], f["rows"], f["unique_questions"], f["duplicates"]) for f in report["files"]] == [
        ("boolq", "train", 3, 2, 1),
        ("boolq", "test", 2, 2, 0),
    ]
    assert report["contamination"] == [
        {"test": "boolq/test", "train": "boolq", "questions": 1, "share": 0.5, "same_suite": True}
    ]
    assert report["problems"] == []


def test_table_and_token_lengths(data_dir, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "Is", "it", "1", "2", "?"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)

    done = check_data("--data-dir", data_dir, "--tokenizer", folder)
    assert done.returncode == 0, done.stderr
    assert "boolq 1 (50.0%)" in done.stdout
    report = json.loads(check_data("--data-dir", data_dir, "--tokenizer", folder, "--json").stdout)
    # "Is it 1 ?" + "the correct answer is true" + EOS; the test prompt alone
    assert report["files"][0]["tokens"]["p100"] == 4 + 5 + 1
    assert report["files"][1]["tokens"]["p100"] == 4


def test_a_bad_file_is_named_and_the_others_reported(data_dir):
    write(data_dir, "piqa", "test", ["How?"], answer="answer9")
    done = check_data("--data-dir", data_dir)
    assert done.returncode == 2
    assert "boolq/train" in done.stdout
    assert "piqa/test.json, row 1: answer is 'answer9'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--clean", "math"]])
def test_a_link_to_nothing_is_a_problem_and_no_absent_set(data_dir, arguments):
    write(data_dir, "math_10k", "train", ["What is 1 + 1?", "What is 2 + 2?"], answer="2")
    write(data_dir, "AddSub", "test", ["What is 1 + 1?"], answer="2")
    (data_dir / "gsm8k").mkdir()
    (data_dir / "gsm8k" / "test.json").symlink_to("nowhere")
    done = check_data("--data-dir", data_dir, *arguments)
    assert done.returncode == 2
    assert "gsm8k/test.json: no such file" in done.stderr and done.stderr.count("\n") == 1
    assert not (data_dir / "math_10k_clean").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "missing"], "--data-dir: missing is no folder"),
        (["--data-dir", "{empty}"], "no set of the task table"),
        (["--data-dir", "{data}", "--tokenizer", "missing"], "--tokenizer: missing is no folder"),
        (["--data-dir", "{data}", "--tokenizer", "{empty}"], "no tokenizer there"),
    ],
)
def test_mistakes(data_dir, tmp_path_factory, arguments, message):
    empty = tmp_path_factory.mktemp("empty")
    done = check_data(*(argument.format(data=data_dir, empty=empty) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_published_counts(shared_data):
    done = check_data("--data-dir", shared_data / "llm_adapters", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    files = {(f["set"], f["split"]): (f["rows"], f["unique_questions"]) for f in report["files"]}
    assert files["math_10k", "train"] == (9919, 8663)
    shares = {c["test"]: round(100 * c["share"], 1) for c in report["contamination"] if c["train"] == "math_10k"}
    expected = {"MultiArith/test": 94.8, "SingleEq/test": 88.4, "AddSub/test": 83.8, "gsm8k/test": 0, "AQuA/test": 0}
    assert expected.items() <= shares.items()


def test_a_training_set_without_its_test_questions(tmp_path):
    for name, split, questions in (
        ("math_10k", "train", ["What is 1 + 1?", "What is 2 + 2?", "what is 1+1", "what is 3+3"]),
        ("AddSub", "test", ["What is 1 + 1 ?"]),
    ):
        write(tmp_path, name, split, questions, answer="2")
    (tmp_path / "gsm8k").mkdir()
    row = {"question": "What is 3 + 3?", "answer": "3 + 3 = 6\n#### 6"}  # as it comes, a line each
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n")
    done = check_data("--data-dir", tmp_path, "--clean", "math")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "math_10k_clean" / "train.json"
    assert [row["instruction"] for row in json.loads(file.read_text())] == ["What is 2 + 2?"]
    assert f"{file}: 1 of 4 rows; train on it with task=math_clean" in done.stdout
    assert "not there: MultiArith, SingleEq, SVAMP, mawps, AQuA" in done.stdout
    report = json.loads(check_data("--data-dir", tmp_path, "--json").stdout)
    assert {found["train"]: found["questions"] for found in report["contamination"]} == {
        "math_10k": 1,
        "math_10k_clean": 0,
    }

    before = file.read_bytes()
    done = check_data("--data-dir", tmp_path, "--clean", "math")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --clean math: {file} is already there; remove it to write it again\n",
    )
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("task", "said"),
    [("boolq", "choose from math"), ("math", "math_10k/train.json: no such file"), ("maths", "did you mean math")],
)
def test_what_cannot_be_cleaned(tmp_path, task, said):
    done = check_data("--data-dir", tmp_path, "--clean", task)
    assert done.returncode == 2
    assert said in done.stderr


def test_cleaning_needs_a_test_set(tmp_path):
    write(tmp_path, "math_10k", "train", ["What is 1 + 1?"], answer="2")
    done = check_data("--data-dir", tmp_path, "--clean", "math")
    assert done.returncode == 2
    assert "holds no test set of the math suite" in done.stderr
