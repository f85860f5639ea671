"""From examples to token ids and the mask of those that are learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from neuroada.config.data import Data
from neuroada.data.chat import ChatTemplate, Rendered
from neuroada.data.formats import Chat, Completion, Example, Preference, RowError, Text
from neuroada.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """One sequence. learnt[p]: whether ids[p] is to be predicted; never its first token, which nothing precedes."""

    ids: np.ndarray  # [tokens] int32
    learnt: np.ndarray  # [tokens] bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Counts:
    """What became of the examples, by the words a summary uses."""

    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    split: int = 0
    unrolled: int = 0  # chats that became a sequence for each assistant turn

    def add(self, other: Counts) -> None:
        """Add what became of other examples."""
        self.dropped.update(other.dropped)
        self.truncated += other.truncated
        self.split += other.split
        self.unrolled += other.unrolled


class Encoder:
    """Encodes examples as `data` says, into at most `max_length` tokens each.

    One example gives a list of units; a unit is one sequence, or (chosen, rejected) of a preference pair. What is left
    out is counted in `counts`; RowError is a row's own fault.
    """

    def __init__(self, tokenizer: Any, data: Data, max_length: int, template: ChatTemplate | None) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model: the tokenizer of {tokenizer.name_or_path!r} has no EOS token; set its eos_token")
        if not tokenizer.is_fast:
            raise UserError(
                f"model: the tokenizer of {tokenizer.name_or_path!r} is a slow one, which cannot say which characters "
                "a token stands for; use a model with a tokenizer.json"
            )
        self.tokenizer, self.data, self.max_length, self.template = tokenizer, data, max_length, template
        self.counts = Counts()
        self.eos = int(tokenizer.eos_token_id)
        self.adds_eos = tokenizer("a")["input_ids"][-1] == self.eos

    def render(self, example: Example) -> list[list[Rendered]]:
        """The units of an example, as texts. RowError where its chat template fails."""
        if isinstance(example, Preference):
            return [[self._render_one(side)[-1] for side in (example.chosen, example.rejected)]]
        return [[rendered] for rendered in self._render_one(example)]

    def encode(self, rendered: Sequence[list[list[Rendered]]]) -> Iterator[list[list[Tokens]] | RowError]:
        """The units of each example, fitted into max_length; [] where nothing of an example is left."""
        flat = [one for units in rendered for unit in units for one in unit]
        ids = iter(self._tokenise(flat))
        for units in rendered:
            found = [[next(ids) for _ in unit] for unit in units]
            texts = [unit[0] for unit in units]
            try:
                yield [fitted for unit, text in zip(found, texts, strict=True) for fitted in self._fit(unit, text)]
            except RowError as error:
                yield error

    # ---- rendering

    def _render_one(self, example: Chat | Completion | Text) -> list[Rendered]:
        if isinstance(example, Text):
            return [Rendered(example.text, ((0, len(example.text)),), chat=False, document=True)]
        train_on = self.data.train_on
        if isinstance(example, Completion):
            text = example.prompt + example.completion
            start = 0 if train_on == "all" else len(example.prompt)
            return [Rendered(text, ((start, len(text)),), chat=False)]
        if self.template is None:
            raise RowError("turns need a chat template; set data.chat_template")
        if train_on == "all":
            text = self.template.render(example.messages, example.tools)
            return [Rendered(text, ((0, len(text)),))]
        if train_on == "completion" and not example.given:
            raise RowError("train_on: completion, but a chat has no completion; train on assistant or last_assistant")
        found = self.template.sequences(example)
        self.counts.unrolled += len(found) > 1
        if train_on == "assistant":
            return found
        last = found[-1]
        turns = last.turns[-1:] if train_on == "last_assistant" else ((last.turns[0][0], last.turns[-1][1]),)
        return [replace(last, turns=turns)]

    # ---- tokens

    def _tokenise(self, texts: list[Rendered]) -> Iterator[Tokens]:
        encodings = {}
        for chat in (True, False):
            chosen = [one.text for one in texts if one.chat is chat]
            encodings[chat] = iter(self._encodings(chosen, special=not chat))
        for one in texts:
            yield self._mask(one, next(encodings[one.chat]))

    def _encodings(self, texts: list[str], special: bool) -> list[Any]:
        """`tokenizers.Encoding`s, which know the characters of every token."""
        return self.tokenizer(texts, add_special_tokens=special, verbose=False).encodings if texts else []

    def _mask(self, text: Rendered, encoding: Any) -> Tokens:
        """Tokens of one text from its encoding, BOS as the tokenizer writes it and never twice, EOS where it ends."""
        ids, ranges = self._align(text, encoding)
        learnt = np.zeros(len(ids) + 1, dtype=bool)
        for number, (start, end) in enumerate(ranges):
            self._learn(text, ids, learnt, start, end, last=number == len(ranges) - 1)
        if self._needs_eos(text, ids, ranges):
            ids.append(self.eos)
            learnt[len(ids) - 1] = self.data.train_on_eos != "none"
        learnt = learnt[: len(ids)]
        learnt[0] = False
        return Tokens(np.array(ids, dtype=np.int32), learnt)

    def _learn(self, text: Rendered, ids: list[int], learnt: np.ndarray, start: int, end: int, last: bool) -> None:
        """Mark one turn's tokens, its end-of-turn token as train_on_eos says."""
        learnt[start:end] = True
        stop = self.template.end_of_turn if text.chat and self.template else None
        if stop is None or self.data.train_on == "all":
            return
        if end < len(ids) and ids[end] == stop:
            end += 1  # marks that leave the token out
        place = next((p for p in range(end - 1, start - 1, -1) if ids[p] == stop), None)
        if place is None:
            return
        if self.data.train_on_eos == "turn" or (self.data.train_on_eos == "last" and last):
            learnt[place] = True
            if not text.marked:
                learnt[place + 1 : end] = False  # what the template writes between turns, the model never says
        else:
            learnt[place:end] = False

    def _needs_eos(self, text: Rendered, ids: list[int], ranges: list[tuple[int, int]]) -> bool:
        """Texts end in EOS. A chat ends as its template says, unless it gives the model no way to end its last turn."""
        if ids and ids[-1] == self.eos:
            return False
        if not text.chat:
            return True
        at_end = bool(ranges) and ranges[-1][1] == len(ids)
        return at_end and self.template is not None and self.template.end_of_turn is None

    def _align(self, text: Rendered, encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the turns as half-open ranges of tokens.

        Where a token would span the beginning of a turn, the text is tokenised in two pieces there: so the model is
        given the prompt's own tokens, as it will be when it generates.
        """
        crossed = [start for start, _ in text.turns if _crosses(encoding, start)]
        bounds = [0, *crossed, len(text.text)]
        ids: list[int] = []
        found: dict[int, int] = {}  # the character where a turn begins or ends -> its token
        for begin, end in pairwise(bounds):
            if crossed:
                (encoding,) = self._encodings([text.text[begin:end]], special=not text.chat and begin == 0)
            some = list(encoding.ids)
            bos_twice = begin == 0 and len(some) > 1 and some[0] == some[1] == self.tokenizer.bos_token_id
            if not text.chat and self.adds_eos and begin == 0 and some and some[-1] == self.eos:
                some.pop()
            for place in {place for turn in text.turns for place in turn}:
                if begin <= place < end or place == end == len(text.text):
                    at = _token_at(encoding, place - begin, end - begin)
                    found[place] = len(ids) + (len(some) if at is None else at) - bos_twice
            ids += some[bos_twice:]
        return ids, [(max(found[a], 0), min(found[b], len(ids))) for a, b in text.turns]

    # ---- length

    def _fit(self, unit: list[Tokens], text: Rendered) -> Iterator[list[Tokens]]:
        """`unit` within max_length, by excess_length."""
        longest = max(map(len, unit))
        if not all(one.learnt.any() for one in unit):
            raise RowError("no token to learn; remove the row, or check chat_template and train_on")
        if longest <= self.max_length:
            yield unit
        elif text.document:
            yield from self._windows(unit[0])
        elif self.data.excess_length == "error":
            raise RowError(f"{longest:,} tokens, more than train.max_length = {self.max_length:,}; raise it")
        elif self.data.excess_length == "split" and len(unit) == 1:
            self.counts.split += 1
            yield from self._windows(unit[0])
        elif self.data.excess_length == "truncate":
            cut = [Tokens(one.ids[: self.max_length], one.learnt[: self.max_length]) for one in unit]
            if all(one.learnt.any() for one in cut):
                self.counts.truncated += 1
                yield cut
            else:
                self.counts.dropped["nothing to learn within train.max_length"] += 1
        else:
            self.counts.dropped["longer than train.max_length"] += 1

    def _windows(self, one: Tokens) -> Iterator[list[Tokens]]:
        """Full windows, each beginning with the last token of the one before: so every token is predicted once."""
        for start in range(0, len(one) - 1, self.max_length - 1):
            window = slice(start, start + self.max_length)
            learnt = one.learnt[window].copy()
            learnt[0] = False
            if learnt.any():
                yield [Tokens(one.ids[window], learnt)]


def _token_at(encoding: Any, place: int, length: int) -> int | None:
    """The first token that begins at character `place` (of `length`) or after it."""
    while place < length:
        token = encoding.char_to_token(place)
        if token is not None and encoding.token_to_chars(token)[0] >= place:
            return token
        place += 1
    return None


def _crosses(encoding: Any, place: int) -> bool:
    """Whether a token stands for characters on both sides of `place`."""
    token = encoding.char_to_token(place)
    return token is not None and encoding.token_to_chars(token)[0] < place
