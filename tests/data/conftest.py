import json

import pytest
from chat_tokenizers import build_tokenizer


@pytest.fixture
def tokenizer():
    return build_tokenizer("smollm2")


@pytest.fixture
def write(tmp_path):
    """Writes rows as a .jsonl file; returns its path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
