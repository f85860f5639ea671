"""Loading examples, every way a file can be wrong, and what two sets have in common."""

import json

import pytest

from neuroada.errors import UserError
from neuroada.tasks.data import contamination, fingerprint, load_examples, question_key
from neuroada.tasks.table import get_task


def row(instruction="Is 7 prime?", answer="true", output="the correct answer is true", **more):
    return {"instruction": instruction, "input": "", "output": output, "answer": answer, **more}


def write(folder, name, content, split="test", suffix="json"):
    path = folder / name / f"{split}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_loads_in_order_and_only_the_columns(tmp_path):
    write(tmp_path, "boolq", [row("a?", id=7), row("b?", "false")])
    examples = load_examples(get_task("boolq"), "test", tmp_path)
    assert examples == [row("a?"), row("b?", "false")]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("boolq", "", "is empty"),
        ("boolq", '[{"instruction": ', "not JSON at line 1"),
        ("boolq", {"rows": []}, "holds a dict, expected a list of objects"),
        ("boolq", [], "no rows"),
        ("boolq", [row(), "text"], "row 2: a str, expected an object"),
        ("boolq", [row(), row(), None], "row 3: a NoneType"),
        ("boolq", [{"instruction": "?", "input": "", "output": ""}], "row 1: key 'answer' is missing"),
        ("boolq", [{"input": "", "output": "", "answer": "true"}], "row 1: key 'instruction' is missing"),
        ("boolq", [row(), row(answer=True)], "row 2: answer is true, expected a string"),
        ("gsm8k", [row(answer=5.0)], "row 1: answer is 5.0, expected a string"),
        ("boolq", [row(instruction=" \n")], "row 1: instruction is empty"),
        ("boolq", [row(), row(answer="answer9")], "row 2: answer is 'answer9', expected one of true, false"),
        ("ARC-Easy", [row(answer="answer9")], "row 1: answer is 'answer9', expected one of answer1"),
        ("gsm8k", [row(answer="B")], "row 1: answer is 'B', expected a number"),
        ("gsm8k", [row(answer="")], "row 1: answer is '', expected a number"),
        ("AQuA", [row(answer="15.0")], "row 1: answer is '15.0', expected one of A, B, C, D, E"),
    ],
)
def test_bad_file_is_named_with_row_and_key(tmp_path, task, content, message):
    path = write(tmp_path, task, content)
    with pytest.raises(UserError) as mistake:
        load_examples(get_task(task), "test", tmp_path)
    assert message in str(mistake.value)
    assert str(path) in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_missing_file_and_split(tmp_path):
    with pytest.raises(UserError, match=r"boolq.test.json: no such file"):
        load_examples(get_task("boolq"), "test", tmp_path)
    with pytest.raises(UserError, match="SVAMP has no training set"):
        load_examples(get_task("SVAMP"), "train", tmp_path)
    with pytest.raises(UserError, match="math has no test set"):
        load_examples(get_task("math"), "test", tmp_path)
    with pytest.raises(UserError, match="split: 'dev' is none of train, validation, test"):
        load_examples(get_task("boolq"), "dev", tmp_path)


def test_not_utf8(tmp_path):
    path = write(tmp_path, "boolq", "")
    path.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        load_examples(get_task("boolq"), "test", tmp_path)


def test_training_row_without_anything_to_learn(tmp_path):
    write(tmp_path, "math_10k", [row(answer="5.0", output=" ")], split="train")
    with pytest.raises(UserError, match=r"row 1: .*output"):
        load_examples(get_task("math"), "train", tmp_path)


def test_mixed_answers_of_math_10k(tmp_path):
    write(tmp_path, "math_10k", [row(answer="-5.5"), row(answer="C"), row(answer="F")], split="train")
    with pytest.raises(UserError, match="row 3: answer is 'F', expected a number or one of A to E"):
        load_examples(get_task("math"), "train", tmp_path)


def test_json_lines_of_gsm8k(tmp_path):
    lines = [
        {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,024"},
        {"question": "And?\u2028", "answer": "1\n#### 1"},
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = write(tmp_path, "gsm8k", content, "train", "jsonl")
    examples = load_examples(get_task("gsm8k"), "train", tmp_path)
    assert examples[0] == row("How many?", "1024", "She sold 48/2 = 24 clips.\nThe answer is 1,024")
    assert len(examples) == 2
    path.write_text(content + "{\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train.jsonl, line 3: not JSON"):
        load_examples(get_task("gsm8k"), "train", tmp_path)


def test_real_gsm8k_training_set(shared_data, tmp_path):
    (tmp_path / "gsm8k").symlink_to(shared_data / "gsm8k_train")
    task = get_task("gsm8k")
    examples = load_examples(task, "train", tmp_path)
    assert len(examples) == 7473
    for one in examples:
        assert "<<" not in task.target(one)
        assert task.published(task.target(one), one["answer"]).correct
        assert task.sound(task.target(one), one["answer"]).correct


def test_question_key():
    assert question_key(row("What's  1,000 + 5?")) == "whats10005"
    assert question_key({"sentence1": "A b", "sentence2": "C.", "label": "1"}) == "abc"
    assert question_key(row("中国的首都?")) == "中国的首都?"  # nothing would be left of it


def test_contamination_and_fingerprint():
    train = [row("What is 2 + 2?"), row("Who?")]
    test = [row("Where?"), row("what is 2+2 ?", "false"), row("Who")]
    assert contamination(test, train) == {1, 2}
    assert fingerprint(train) == fingerprint([dict(reversed(one.items())) for one in train])
    assert len({fingerprint(some) for some in (train, train[::-1], test, [row("What is 2 + 2?"), row("Whose?")])}) == 4


@pytest.mark.parametrize(
    ("name", "share"), [("MultiArith", 0.948), ("SingleEq", 0.884), ("AddSub", 0.838), ("gsm8k", 0), ("AQuA", 0)]
)
def test_contamination_by_math_10k(shared_data, name, share):
    train = load_examples(get_task("math"), "train", shared_data / "llm_adapters")
    test = load_examples(get_task(name), "test", shared_data / "llm_adapters")
    assert len(contamination(test, train)) / len(test) == pytest.approx(share, abs=5e-4)


SIZES = {"boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "ARC-Easy": 2376, "ARC-Challenge": 1172, "openbookqa": 500}
SIZES |= {"MultiArith": 600, "gsm8k": 1319, "AddSub": 395, "AQuA": 254, "SingleEq": 508}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_real_test_sets(shared_data, name):
    assert len(load_examples(get_task(name), "test", shared_data / "llm_adapters")) == SIZES[name]


def test_sizes_of_real_training_sets(shared_data):
    folder = shared_data / "llm_adapters"
    sizes = {"math": 9919, "boolq": 9427, "ARC-Easy": 2251, "ARC-Challenge": 1119, "openbookqa": 4957}
    assert {name: len(load_examples(get_task(name), "train", folder)) for name in sizes} == sizes
    parts = [load_examples(get_task("commonsense_15k"), split, folder) for split in ("train", "validation")]
    assert sum(map(len, parts)) == 15_119
    assert load_examples(get_task("commonsense_15k"), "test", folder) == parts[1]  # the rest of the set is its test
