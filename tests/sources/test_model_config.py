"""A model's config.json, before transformers makes anything of it."""

import json
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.hf.loading import load_tokenizer
from neuroada.hf.model_folder import read_config
from neuroada.sources.tiny import make_tiny


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


def test_a_tokenizer_whose_ids_the_model_does_not_know(tmp_path: Path) -> None:
    """Training would end in an index error, on a GPU of no more words than "device-side assert"."""
    make_tiny(tmp_path, hidden=16)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocabulary = whole["model"]["vocab"]
    last = max(vocabulary, key=lambda token: vocabulary[token])
    path.write_text(json.dumps({**whole, "model": {**whole["model"], "vocab": {**vocabulary, last: len(vocabulary)}}}))
    with pytest.raises(UserError, match=rf"gives .* the id {len(vocabulary)}, and the model knows {len(vocabulary)}"):
        load_tokenizer(str(tmp_path))

    path.write_text(json.dumps(whole))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<new>"}))
    with pytest.raises(UserError, match="gives '<new>' the id"):
        load_tokenizer(str(tmp_path))

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<new>"}))
    assert load_tokenizer(str(tmp_path)).pad_token == settings["eos_token"]  # padding is masked anyway
