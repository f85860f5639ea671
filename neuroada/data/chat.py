"""A chat as text, and which characters of it the model is to learn.

Where the template marks what the model generates ({% generation %}), its marks are followed. Elsewhere a turn is found
by rendering: the chat up to the turn, with the generation prompt, is what the model is given; the chat with the turn,
less that, is what it has to say. Both must be a prefix of the whole chat. Templates that rewrite earlier turns (Qwen3
drops their reasoning, Mistral moves the system turn) break this: then each assistant turn becomes a sequence of its
own, rendered as the model will see it. A template for which even that fails is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from neuroada.data.formats import Chat, RowError
from neuroada.errors import UserError
from neuroada.files import read_text

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "qza"
_PROBE = [("user", "qzu0"), ("assistant", "qza0"), ("user", "qzu1"), ("assistant", "qza1")]


@dataclass(frozen=True)
class Rendered:
    """A text and the half-open ranges of its characters that the model says, a turn each, in order.

    chat: written by a template, special tokens included. marked: the ranges are the template's own marks, and learnt as
    they stand. document: plain text, which is divided where it is too long.
    """

    text: str
    turns: tuple[tuple[int, int], ...]
    chat: bool = True
    marked: bool = False
    document: bool = False


class ChatTemplate:
    """A tokenizer with one chat template."""

    def __init__(self, tokenizer: Any, source: str = "tokenizer", field: str = "data.chat_template") -> None:
        """source: "tokenizer", or the path of a .jinja file. UserError, naming `field`, where there is no template."""
        self.tokenizer, self.source = tokenizer, source
        self.template = read_template(source, field)
        if self.template is None and tokenizer.chat_template is None:
            raise UserError(f"{field} = tokenizer: that of {tokenizer.name_or_path!r} has none; give a .jinja file")

    def identity(self) -> list[Any]:
        """What decides the rendering of a chat, for a hash."""
        return [self.template or self.tokenizer.chat_template, self.tokenizer.special_tokens_map]

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The chat as text; prompt: with what the template writes before an answer. RowError where it fails."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__
            line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise RowError(f"the chat template fails{line}: {reason.splitlines()[0]}") from None

    def before_answer(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """(what the model is given, with the generation prompt; what the template writes between it and the answer's
        text). RowError where the template renders an answer otherwise."""
        prompt = self.render(messages, prompt=True)
        whole = self.render([*messages, {"role": "assistant", "content": _ANSWER}])
        place = whole.rfind(_ANSWER)
        if not whole.startswith(prompt) or place < len(prompt):
            raise RowError("the chat template renders an answer otherwise than its generation prompt begins it")
        return prompt, whole[len(prompt) : place]

    def sequences(self, chat: Chat) -> list[Rendered]:
        """The chat as one sequence, with a range for every assistant turn after the given ones; or, where the template
        rewrites earlier turns, as a sequence for each of them."""
        numbers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= chat.given]
        if self.has_marks(chat.tools):
            rendered = self._by_marks(chat, numbers)
            if rendered is not None:
                return [rendered]
        whole = self.render(chat.messages, chat.tools)
        # What the model is given before each turn, and the chat up to the turn's end.
        prompts = [self.render(chat.messages[:i], chat.tools, prompt=True) for i in numbers]
        ends = [
            whole if i + 1 == len(chat.messages) else self.render(chat.messages[: i + 1], chat.tools) for i in numbers
        ]
        spans = [self._span(whole, prompt, end) for prompt, end in zip(prompts, ends, strict=True)]
        if all(span is not None for span in spans):
            return [Rendered(whole, tuple(span for span in spans if span is not None))]
        alone = [self._span(end, prompt, end) for prompt, end in zip(prompts, ends, strict=True)]
        if any(span is None for span in alone):
            raise RowError(
                "the chat template renders a turn otherwise than its generation prompt begins it, so what to learn is "
                "unknown; give a chat_template with {% generation %} marks"
            )
        return [Rendered(end, (span,)) for end, span in zip(ends, alone, strict=True) if span is not None]

    def _span(self, whole: str, prompt: str, end: str) -> tuple[int, int] | None:
        """Where the turn lies in `whole`, if both renderings are prefixes of it."""
        if not whole.startswith(prompt):
            return None
        for closing in ("", self.tokenizer.eos_token or ""):  # Phi-3 closes a chat, but no turn, with its EOS
            if end.endswith(closing) and whole.startswith(end.removesuffix(closing)):
                length = len(end.removesuffix(closing))
                return (len(prompt), length) if length > len(prompt) else None
        return None

    # ---- a template's own marks

    def has_marks(self, tools: list[Any] | None = None) -> bool:
        return _MARK.search(self._text(tools)) is not None

    def _text(self, tools: list[Any] | None) -> str:
        return self.template or self.tokenizer.get_chat_template(None, tools)

    def _by_marks(self, chat: Chat, numbers: list[int]) -> Rendered | None:
        """None where the marks do not enclose the turns' texts."""
        from transformers.utils.chat_template_utils import render_jinja_template  # seconds, where no mark is

        whole = self.render(chat.messages, chat.tools)
        messages = [{key: value for key, value in turn.items() if value is not None} for turn in chat.messages]
        rendered: Any = render_jinja_template(  # annotated as str; a pair of lists
            [messages],
            tools=chat.tools,
            chat_template=self._text(chat.tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (text,), (marks,) = rendered
        joined: list[tuple[int, int]] = []
        for start, end in marks:  # a closing EOS may have a mark of its own
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            elif end > start:
                joined.append((start, end))
        turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        if text != whole or len(joined) != len(turns):
            return None
        if any(
            (messages[i].get("content") or "").strip() not in text[a:b] for i, (a, b) in zip(turns, joined, strict=True)
        ):
            return None
        return Rendered(text, tuple(mark for i, mark in zip(turns, joined, strict=True) if i in numbers), marked=True)

    # ---- the end of a turn

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the template writes after an assistant's turn; None if it writes none."""
        try:
            text = self.render([{"role": role, "content": content} for role, content in _PROBE])
        except RowError:
            return self.tokenizer.eos_token_id
        positions = [text.find(content) for _, content in _PROBE]
        if -1 in positions or any(a > b for a, b in pairwise(positions)):
            return self.tokenizer.eos_token_id
        after = text[positions[1] + len(_PROBE[1][1]) : positions[2]]
        special = special_ids(self.tokenizer)
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in special), None)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that stand for no text."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def read_template(source: str, field: str) -> str | None:
    """The text of a .jinja file; None where `source` is "tokenizer". UserError, naming `field`: there is no file."""
    if source == "tokenizer":
        return None
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{field} = {source}: no such file; write tokenizer, or the path of a .jinja file")
    return read_text(path, limit=1 << 20)
