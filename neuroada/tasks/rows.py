"""From a row as a file has it to the columns of an Example, before the columns are checked."""

import re
from typing import Any


def unchanged(row: dict[str, Any]) -> dict[str, Any]:
    """LLM-Adapters' own form."""
    return row


def from_gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K's own files ({question, answer: "rationale #### 72"}) in LLM-Adapters' form, others unchanged.

    The calculator's marks ("<<48/2=24>>") are dropped and the last line becomes "The answer is 72".
    """
    if "question" not in row or not isinstance(row.get("answer"), str):
        return row
    rationale, _, answer = re.sub(r"<<[^>]*>>", "", row["answer"]).partition("####")
    answer = answer.strip()
    return {
        "instruction": row["question"],
        "input": "",
        "output": f"{rationale.strip()}\nThe answer is {answer}",
        "answer": answer.replace(",", ""),
    }
