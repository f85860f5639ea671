"""`neuroada preview`, the summary, and the report's sections on own data."""

import json

import pytest
import yaml
from chat_tokenizers import build_tokenizer

from neuroada.cli.main import dispatch
from neuroada.errors import UserError
from neuroada.reporting.data import data, validation
from neuroada.runs.run_folder import RunFolder


@pytest.fixture
def recipe(tmp_path, write):
    """A recipe's path, over three chats of which the last is long; its model is a tokenizer alone."""
    tokenizer = build_tokenizer("smollm2")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "What is the sum?"}, {"role": "assistant", "content": "Forty-six."}]
    long = [turns[0], {"role": "assistant", "content": "Nothing more. " * 60}]
    values = {
        "model": str(tmp_path / "model"),
        "data": {"datasets": [{"path": write([{"messages": turns}, {"messages": turns}, {"messages": long}])}]},
        "data_dir": str(tmp_path / "data"),
        "adapter": {"target_modules": ["q_proj"]},
        "optimizer": {"lr": 0.1},
        "train": {"max_length": 128, "dtype": "fp32"},
        "output_dir": str(tmp_path / "run"),
        "provenance": "a test",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "recipe.yaml")


def test_learnt_and_left_out_tokens_are_marked(recipe, capsys):
    dispatch(["preview", "--recipe", recipe])
    said = capsys.readouterr().out
    assert said.count("«Forty-six.<|im_end|>»") == 2
    assert "rows.jsonl, row" in said
    assert "more than train.max_length = 128 (excess_length: drop)" in " ".join(said.split())
    assert "~~<|im_start|>system" in said
    assert "1 longer" in said


def test_the_summary_as_json(recipe, capsys):
    dispatch(["preview", "--recipe", recipe, "--json", "data.excess_length=truncate"])
    summary = json.loads(capsys.readouterr().out)
    (source,) = summary["sources"]
    assert (source["format"], source["rows"], source["truncated"], summary["longest"]) == ("chat", 3, 1, 128)
    assert 0 <= summary["padding"] < 1 and summary["learnt"] < summary["tokens"]


def test_a_task_has_no_preview(tmp_path):
    with pytest.raises(UserError, match="preview shows own data, and this recipe has task: arithmetic"):
        dispatch(["preview", "--recipe", "tiny_arithmetic"])


def test_the_report_shows_data_and_validation(tmp_path):
    source = {"path": "mine/a&b.jsonl", "format": "chat", "rows": 9, "sequences": 8, "dropped": {"too long": 1},
              "truncated": 0, "split": 0, "skipped": 0}  # fmt: skip
    summary = {"sources": [source], "sequences": 8, "p50": 5, "p95": 9, "longest": 9, "tokens": 50, "learnt": 20,
               "padding": 0.2}  # fmt: skip
    examples = [[["<q>", False], ["<a>", True]]]
    (tmp_path / "data.json").write_text(json.dumps({"summary": summary, "examples": examples}))
    samples = [{"prompt": "p", "expected": "e", "answer": "said"}]
    measured = [
        {"step": 0, "loss": 2.0, "samples": []},
        {"step": 4, "loss": 1.5, "samples": samples},
        {"step": 8, "loss": 1.6, "samples": samples},
    ]
    (tmp_path / "validation.json").write_text(json.dumps({"measured": measured}))
    (tmp_path / "recipe.yaml").write_text("task: null")
    (tmp_path / "metrics.jsonl").write_text("")
    run = RunFolder.read(tmp_path)
    shown = data(run)
    assert "&lt;q&gt;<mark>&lt;a&gt;</mark>" in shown and "a&amp;b.jsonl" in shown and "mine/" not in shown
    assert "padding would add 25 %" in shown
    assert [entry["step"] for entry in run.validation] == [0, 4, 8]
    assert "Lowest at step 4: 1.5000" in validation(run) and "said" in validation(run)
