"""What a model loses on text that is not the task's, before training and after it: how much it has forgotten."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from neuroada.config.data import Data, Dataset
from neuroada.data.encoding import Encoder, Tokens
from neuroada.data.formats import RowError, Text
from neuroada.data.sources import Source, find_source
from neuroada.errors import UserError

TOKENS = 2**15
"""The first so many of the file are scored."""
CHARACTERS = 16 * TOKENS
"""More of a text is not tokenised: ordinary text has three to five characters a token."""


@cache  # of a comparison, whose every run is told apart by it
def identity(file: str) -> str:
    """The file's name and a hash of its content. UserError: no such file, or of a kind that is not read."""
    source = _find(file)
    return f"{source.files[0].name}, sha256 {source.fingerprint()[:16]}"


def score(model: Any, tokenizer: Any, file: str, max_length: int) -> dict[str, float | int]:
    """{"loss": cross-entropy in nats per token, "tokens": how many were scored}, of a causal language model."""
    import torch

    from neuroada.objectives.cross_entropy import answer_loss
    from neuroada.objectives.micro_batch import collate_sequences

    scored = windows(file, tokenizer, max_length)
    tokens, total = sum(int(one.learnt.sum()) for one in scored), 0.0
    with torch.inference_mode():
        for one in scored:  # each alone: every position has logits, and a row of them is large enough
            batch = collate_sequences([one], packing=False, pad_id=0).to(model.device)
            total += answer_loss(model, batch).item()
    return {"loss": total / tokens, "tokens": tokens}


def windows(file: str, tokenizer: Any, max_length: int) -> list[Tokens]:
    """The first TOKENS tokens of the file's texts that are predicted, in windows of at most `max_length`.

    A window begins with the last token of the one before: every token of a text but its first is predicted once. A
    text's end (EOS) is not. UserError: a row without a text, or nothing to predict.
    """
    source = _find(file)
    encoder = Encoder(tokenizer, Data(datasets=[source.spec], train_on_eos="none"), max_length, template=None)
    found: list[Tokens] = []
    left = TOKENS
    for text in _texts(source):
        (units,) = encoder.encode([encoder.render(Text(text[:CHARACTERS]))])
        for (one,) in [] if isinstance(units, RowError) else units:  # of one token nothing is predicted
            found.append(Tokens(one.ids[: left + 1], one.learnt[: left + 1]))
            left -= int(found[-1].learnt.sum())
            if not left:
                return found
    if not found:
        raise UserError(f"--general-text {file}: holds no text of two tokens; give a longer one")
    return found


def _texts(source: Source) -> Iterator[str]:
    """The texts that are not blank; other columns are not read."""
    for row in source.rows():
        text = row.values.get("text") if isinstance(row.values, dict) else None
        if not isinstance(text, str):
            fault = row.error or f"text is {json.dumps(text, default=str)[:60]}, expected a text a row"
            raise UserError(f"--general-text: {row.where}: {fault}")
        if text.strip():
            yield text


def _find(file: str) -> Source:
    if not Path(file).expanduser().is_file():
        raise UserError(f"--general-text {file}: no such file; give one of text (.txt, or .jsonl with a text a row)")
    return find_source(Dataset(path=file, type="text"), field="--general-text")
