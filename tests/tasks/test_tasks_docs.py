"""The worked example of docs/tasks.md, carried out to the letter."""

import importlib.util
import re
from pathlib import Path

import pytest

from neuroada.config import reference
from neuroada.config.task_file import TaskFile
from neuroada.data.task_file import load_task
from neuroada.errors import UserError
from neuroada.tasks import data, table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


def test_a_task_of_your_own(tmp_path):
    blocks = dict.fromkeys(("json", "python"), ())
    for language, block in re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        blocks[language] = (*blocks.get(language, ()), block)
    (rows,), (reader, row) = blocks["json"], blocks["python"]

    (tmp_path / "capitals").mkdir()
    (tmp_path / "capitals" / "test.json").write_text(rows, encoding="utf-8")
    (tmp_path / "capitals.py").write_text(reader, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("capitals", tmp_path / "capitals.py")
    capitals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(capitals)
    task = eval(row, vars(table) | {"capitals": capitals})

    examples = data.load_examples(task, "test", tmp_path)
    assert task.prompt(examples[0]) == "What is the capital of France?\n"
    assert task.target(examples[0]) == "Paris"
    assert task.sound("paris.\nAnd so on", examples[0]["answer"]).correct
    assert not task.published("paris.\nAnd so on", examples[0]["answer"]).correct
    assert not task.sound("", examples[0]["answer"]).correct
    assert task.baseline([example["answer"] for example in examples]) == 0.5


def test_a_task_file_of_your_own(tmp_path, monkeypatch):
    text = DOCS.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(yaml|jsonl)\n(.*?)```", text, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for language, block in blocks.items():
        (tmp_path / "mine" / f"capitals.{language}").write_text(block, encoding="utf-8")
    task = load_task("mine/capitals.yaml")
    first, second = task.generate("test")
    assert first["prompt"] == "What is the capital of France?\nAnswer: "
    assert (second["answer"], second["options"]) == ("Lima", ["Lima", "Cusco"])
    (tmp_path / "mine" / "capitals.yaml").write_text(blocks["yaml"].replace("{capital}", "{capitol}"))
    (said,) = re.findall(r"^    error: (mine/capitals.*)$", text, re.MULTILINE)
    with pytest.raises(UserError, match=re.escape(said)):
        load_task("mine/capitals.yaml")


def test_the_table_of_every_field_is_the_schemas():
    """`python -m neuroada.config.reference task` prints it."""
    held = DOCS.read_text().partition("<!-- fields: begin -->\n")[2].partition("\n<!-- fields: end -->")[0]
    assert held == reference.table(TaskFile)
    assert all(meaning for *_, meaning in reference.fields(TaskFile))


def test_the_counts_in_the_text_are_those_of_the_test():
    text = DOCS.read_text(encoding="utf-8")
    for count in ("9,206 of 9,206", "9,202", "713", "371", "688"):
        assert count in text
