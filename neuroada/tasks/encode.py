"""From examples to token ids: once per content, in three flat arrays, cached on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuroada.errors import UserError
from neuroada.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from neuroada.tasks.table import Example, Task

_FORMAT = "1"  # of the cached files and of the rules below: raise it when either changes
_CHUNK = 4096  # texts given to the tokenizer at once: enough for its threads, little memory


@dataclass(frozen=True)
class Encoded:
    """Training sequences, one after the other in flat arrays: prompt, answer, EOS; nothing padded.

    Sequence i is `flat[offsets[i] : offsets[i + 1]]`; its first `prompt_lengths[i]` tokens are the prompt and every
    token after them is an answer token, to be learnt. Labels are thus masked by position, never by token id: a pad
    token that is also the EOS does not hide the EOS.
    """

    flat: np.ndarray  # [tokens] int32
    offsets: np.ndarray  # [n + 1] int64
    prompt_lengths: np.ndarray  # [n] int32
    rows: np.ndarray  # [n] int32: the index of the example that a sequence was made from
    truncated: int  # sequences that lost the end of their answer (the EOS at least) at max_length
    dropped: int  # examples left out: nothing of their answer fits into max_length

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def tokens(self, i: int) -> np.ndarray:
        """Sequence i, [lengths[i]] int32: a view."""
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def answer_start(self, i: int) -> int:
        """The position in sequence i of its first answer token."""
        return int(self.prompt_lengths[i])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n] int64: tokens of each sequence."""
        return np.diff(self.offsets)

    @cached_property
    def num_answer_tokens(self) -> np.ndarray:
        """[n] int64: tokens of each sequence that are learnt, EOS included; at least 1."""
        return self.lengths - self.prompt_lengths

    def __str__(self) -> str:
        said = f"{len(self):,} sequences, {len(self.flat):,} tokens, {int(self.num_answer_tokens.sum()):,} to learn"
        if self.truncated:
            said += f"; {self.truncated:,} answers cut at max_length"
        if self.dropped:
            said += f"; {self.dropped:,} examples dropped, their prompt alone fills max_length"
        return said


def encode(
    examples: Sequence[Example], task: Task, tokenizer: Any, max_length: int, cache_dir: str | Path | None = None
) -> Encoded:
    """Tokenise prompt + target + EOS of every example, at most `max_length` tokens each.

    `tokenizer` is one of transformers'. With `cache_dir` the result is kept there under a hash of all that decides it
    (the texts, the tokenizer, max_length) and read from there, memory-mapped, the next time. Several processes may do
    so at once: each writes a file of its own and renames it. UserError if no example fits or there is no EOS.
    """
    prompts = [task.prompt(example) for example in examples]
    targets = [task.target(example) for example in examples]
    if cache_dir is None:
        return _encode(prompts, targets, tokenizer, max_length)
    path = Path(cache_dir) / f"{_key(prompts, targets, tokenizer, max_length)}.safetensors"
    if path.is_file():
        try:
            return _load(path)
        except UserError as error:
            warnings.warn(f"the token cache is written again: {error}", stacklevel=2)
    encoded = _encode(prompts, targets, tokenizer, max_length)
    try:
        _save(encoded, path)
        return _load(path)  # memory-mapped
    except UserError as error:
        warnings.warn(f"going on without a token cache: {error}", stacklevel=2)
        return encoded


def encode_prompts(prompts: Sequence[str], tokenizer: Any, chat: bool = False) -> list[list[int]]:
    """The token ids a generation starts from: as in training, with the BOS and without the EOS a tokenizer may add.

    chat: rendered by a template, which has written the special tokens; a BOS that it writes twice counts once.
    """
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=not chat, verbose=False)["input_ids"]
    if chat:
        bos = tokenizer.bos_token_id
        return [one[1:] if len(one) > 1 and one[0] == one[1] == bos else one for one in ids]
    return [one[:-1] for one in ids] if _adds_eos(tokenizer) else ids


def encode_pairs(
    prompts: Sequence[str], targets: Sequence[str], tokenizer: Any, chat: bool = False
) -> list[tuple[list[int], int]]:
    """(the tokens of prompt + target, without an EOS; how many of them are the prompt's), of each pair.

    Like the authors' code, prompt + target is tokenised whole and the prompt alone, for its length. Where the two
    disagree (a token spans the boundary: a prompt that ends in a blank, say), the prompt's tokens are followed by the
    target's own, so that a target is always met after the prompt as generation will give it. chat: as encode_prompts.
    """
    wholes = encode_prompts([p + t for p, t in zip(prompts, targets, strict=True)], tokenizer, chat)
    heads = encode_prompts(prompts, tokenizer, chat)
    pairs = []
    for whole, head, target in zip(wholes, heads, targets, strict=True):
        fits = whole[: len(head)] == head
        ids = whole if fits else head + tokenizer(target, add_special_tokens=False)["input_ids"]
        pairs.append((ids, len(head)))
    return pairs


def _adds_eos(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id


def _encode(prompts: list[str], targets: list[str], tokenizer: Any, max_length: int) -> Encoded:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"model: the tokenizer of {tokenizer.name_or_path!r} has no EOS token; set its eos_token")
    pieces: list[np.ndarray] = []
    prompt_lengths, rows = [], []
    truncated = 0
    for start in range(0, len(prompts), _CHUNK):
        some_prompts, some_targets = prompts[start : start + _CHUNK], targets[start : start + _CHUNK]
        for i, (whole, prompt_length) in enumerate(encode_pairs(some_prompts, some_targets, tokenizer)):
            if prompt_length >= max_length:
                continue
            if len(whole) == prompt_length or whole[-1] != eos:
                whole.append(eos)
            truncated += len(whole) > max_length
            pieces.append(np.array(whole[:max_length], dtype=np.int32))
            prompt_lengths.append(prompt_length)
            rows.append(start + i)
    if not pieces:
        raise UserError(f"max_length: {max_length} leaves no room for any answer after the prompt; raise it")
    return Encoded(
        flat=np.concatenate(pieces),
        offsets=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int32),
        rows=np.array(rows, dtype=np.int32),
        truncated=truncated,
        dropped=len(prompts) - len(rows),
    )


# ---- the cache

REMOVE = "remove it"
_ARRAYS = ("flat", "offsets", "prompt_lengths", "rows")


def _key(prompts: list[str], targets: list[str], tokenizer: Any, max_length: int) -> str:
    """sha256 of all that decides an encoding. The texts themselves stand for examples, task and prompt wording."""
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer_fingerprint(tokenizer)} {max_length}\n".encode())
    for pair in zip(prompts, targets, strict=True):
        digest.update(json.dumps(pair).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) of what `tokenizer` does to a text; the padding and truncation last asked of it do not count."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model["padding"] = model["truncation"] = None
    else:
        model = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    probe = tokenizer("a b\n1")["input_ids"]  # special tokens that a slow tokenizer adds
    said = json.dumps([model, tokenizer.eos_token_id, probe], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _save(encoded: Encoded, path: Path) -> None:
    arrays = {name: getattr(encoded, name) for name in _ARRAYS}
    counts = {"truncated": str(encoded.truncated), "dropped": str(encoded.dropped)}
    save_tensors(path, arrays, {**counts, "sha256": _sha256(arrays, counts)})


def _load(path: Path) -> Encoded:
    """UserError: damaged, or not what `_save` wrote."""
    tensors, metadata = load_tensors(path, REMOVE)  # torch's tensors are views of the mapped file, numpy's are copies
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    counts = {name: metadata.get(name, "") for name in ("truncated", "dropped")}
    if arrays.keys() != set(_ARRAYS) or metadata.get("sha256") != _sha256(arrays, counts):
        raise UserError(f"{path}: is damaged (its sha256 differs); {REMOVE}")
    return Encoded(**arrays, truncated=int(counts["truncated"]), dropped=int(counts["dropped"]))


def _sha256(arrays: Mapping[str, np.ndarray], counts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([sorted(counts.items()), sorted(arrays)]).encode())
    for name in sorted(arrays):
        digest.update(f"{arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()
