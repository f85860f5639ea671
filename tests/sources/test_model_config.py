"""A model's config.json, before transformers makes anything of it."""

import json
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.hf.model_folder import read_config


@pytest.mark.parametrize("field", ["attention_dropout", "attn_pdrop", "hidden_dropout_prob"])
@pytest.mark.parametrize("value", [-1, 1, 1e308, True, "0.1", [], {}])
def test_a_dropout_is_a_share(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", field: value}))
    with pytest.raises(UserError, match=field):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [0, 0.0, 0.1, None])
def test_an_ordinary_dropout_is_read(tmp_path: Path, value: float | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "attention_dropout": value}))
    assert read_config(tmp_path)["attention_dropout"] == value
