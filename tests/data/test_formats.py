"""The five formats, and what is told of rows that are not of them."""

import pytest

from neuroada.config.data import Dataset
from neuroada.data.formats import Chat, Completion, Preference, RowError, Text, make_reader
from neuroada.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(row, has_template=True, **spec):
    return make_reader(Dataset(path="rows.jsonl", **spec), row, has_template)(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, Chat([USER, ASSISTANT])),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
         Chat([USER, ASSISTANT])),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
         Chat([{"role": "system", "content": "S"}, USER, ASSISTANT])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
         Chat([USER, ASSISTANT])),
        ({"prompt": "Hi", "completion": "Hello"}, Completion("Hi", "Hello")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Chat([USER, ASSISTANT], given=1)),
        ({"instruction": "Add", "input": "1 2", "output": "3"},
         Chat([{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}], given=1)),
        ({"instruction": "Say hi", "input": "", "output": "Hello"},
         Chat([{"role": "user", "content": "Say hi"}, ASSISTANT], given=1)),
        ({"text": "Hello"}, Text("Hello")),
        ({"prompt": "Hi ", "chosen": "Hello", "rejected": "Go away"},
         Preference(Completion("Hi ", "Hello"), Completion("Hi ", "Go away"))),
        ({"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "No"}]},
         Preference(Chat([USER, ASSISTANT], given=1), Chat([USER, {"role": "assistant", "content": "No"}], given=1))),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "No"}]},
         Preference(Chat([USER, ASSISTANT], given=1), Chat([USER, {"role": "assistant", "content": "No"}], given=1))),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
          "rejected": {"from": "gpt", "value": "No"}},
         None),
    ],
)  # fmt: skip
def test_recognised_and_read(row, expected):
    if expected is None:
        found = read(row, columns={"prompt": "conversations"})
        assert found.chosen == Chat([USER, ASSISTANT], given=1)
    else:
        assert read(row) == expected


def test_alpaca_without_a_chat_template_is_alpacas_own_prompt():
    found = read({"instruction": "Add", "input": "1 2", "output": "3"}, has_template=False)
    assert found.prompt.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n" in found.prompt and found.completion == "3"


def test_tools_as_json_text_and_calls_with_text_arguments():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": '[{"name": "add"}]',
    }
    found = read(row)
    assert found.tools == [{"name": "add"}]
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_own_names():
    row = {"dialogue": [{"who": "me", "said": "Hi"}, {"who": "it", "said": "Hello"}], "id": 7}
    found = read(
        row,
        columns={"messages": "dialogue", "role": "who", "content": "said"},
        roles={"user": ["me"], "assistant": ["it"]},
        ignore_columns=["id"],
    )
    assert found == Chat([USER, ASSISTANT])


@pytest.mark.parametrize(
    ("row", "spec", "said"),
    [
        ({"instruction": "a", "output": "b", "answer": "b", "note": "x"}, {},
         r"column 'answer' is filled but alpaca does not read it; name it in columns, or set "
         r"ignore_columns: \[answer, note\]"),
        ({"prompt": "a", "completion": ""}, {}, "completion is empty"),
        ({"prompt": "a", "completion": None}, {}, "column 'completion' is missing"),
        ({"prompt": "a", "completion": [ASSISTANT]}, {}, "one text and one list of turns"),
        ({"prompt": 3, "completion": [ASSISTANT]}, {}, "prompt is 3, expected a list of turns"),
        ({"messages": [USER]}, {}, "no assistant turn"),
        ({"messages": []}, {}, "expected a list of turns"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, {}, "turn 2: the assistant's turn is empty"),
        ({"messages": [USER, {"role": "bard", "content": "Hi"}]}, {}, "turn 2: role 'bard' is unknown"),
        ({"messages": [USER, {"content": "Hi"}]}, {}, "turn 2: key 'role' is missing"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, {}, "turn 1: key 'content' is missing"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, {}, "turn 1: key 'weight' is filled but nobody reads it"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, {}, "images and sound"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, {}, "tools is no JSON"),
        ({"instruction": "a", "output": 3}, {}, "output is 3, expected text"),
        ({"text": "  "}, {}, "text is empty"),
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, {}, "chosen and rejected are the same"),
        ({"chosen": "x", "rejected": "y"}, {}, "need a prompt"),
        ({"prompt": "Bye", "chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, {}, "is not the turn"),
    ],
)  # fmt: skip
def test_bad_rows(row, spec, said):
    with pytest.raises(RowError, match=said) as found:
        read(row, **spec)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("row", "spec", "said"),
    [
        ({"question": "a", "reply": "b"}, {}, "no format is recognised from the columns question, reply; set type"),
        ({"text": "a"}, {"columns": {"prompt": "text"}}, "columns.prompt is not read by text"),
        ({"a": "x"}, {"type": "text", "columns": {"text": "b"}}, "columns.text = 'b' is no column; it has a"),
    ],
)
def test_bad_columns(row, spec, said):
    with pytest.raises(UserError, match=said):
        read(row, **spec)


def test_a_column_that_the_first_row_lacks_is_read_later():
    reader = make_reader(Dataset(path="x"), ["instruction", "output"], True)
    assert "1 2" in reader({"instruction": "Add", "input": "1 2", "output": "3"}).messages[0]["content"]
