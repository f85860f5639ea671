"""A task's test set, ready to be asked: prompts to continue, or options to compare."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from neuroada.errors import UserError
from neuroada.evaluation.chat_prompts import ChatPrompts
from neuroada.evaluation.generate import Batch
from neuroada.tasks.data import load_examples
from neuroada.tasks.encode import encode_pairs, encode_prompts
from neuroada.tasks.table import Example, MultipleChoice, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scored = tuple[list[int], int]  # the tokens of prompt + option, and where the option begins


class Backend(Protocol):
    """What decodes: which prompts go together, and their greedy continuations as token ids."""

    context: int | None  # tokens of prompt and answer together; None: no limit

    def describe(self) -> list[Any]:
        """Everything about it that may change an answer, for JSON."""

    def plan(self, lengths: Sequence[int], max_new_tokens: int) -> list[Batch]: ...

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, rows: int, on_finished: Callable[[], Any], *stop: int
    ) -> list[list[int]]:
        """stop: token ids that end an answer, beside those that always do."""

    def plan_options(self, lengths: Sequence[Sequence[int]]) -> list[Batch]: ...

    def log_likelihoods(
        self, sequences: Sequence[Scored], rows: int, on_finished: Callable[[], Any]
    ) -> list[float]: ...


class Questions(ABC):
    """`batches` hold positions in `examples`; those in `too_long` are in none: they do not fit the model's context."""

    unit: str  # of what `ask` tells as finished

    def __init__(self, task: Task, examples: list[Example], prompts: list[str]) -> None:
        self.task, self.examples, self.prompts = task, examples, prompts
        self.batches: list[Batch] = []
        self.too_long: set[int] = set()

    @abstractmethod
    def asked(self) -> Any:
        """What decides the answers, for JSON."""

    @abstractmethod
    def cost(self, batch: Batch) -> int:
        """Tokens of a batch."""

    @abstractmethod
    def size(self, batch: Batch) -> int:
        """How often `ask` calls `on_finished`."""

    @abstractmethod
    def ask(self, backend: Backend, batch: Batch, on_finished: Callable[[], Any]) -> list[str]:
        """What the model says to each question of a batch, as a text that is kept in a part file."""

    @abstractmethod
    def read(self, i: int, said: str) -> tuple[str, dict[str, Any]]:
        """(the answer to question i, which is judged; what its prediction holds besides). `said`: "" if too long."""

    @abstractmethod
    def excess(self, i: int) -> str:
        """Why question i is too long."""

    def _plan(self, lengths: Sequence[int], limit: float, plan: Callable[[list[int]], list[Batch]]) -> None:
        """Set `batches` and `too_long`. plan: the positions that fit -> batches of positions among those."""
        fitting = [i for i, length in enumerate(lengths) if length <= limit]
        self.batches = [Batch(tuple(fitting[i] for i in batch.indices), batch.rows) for batch in plan(fitting)]
        self.too_long = set(range(len(lengths))) - set(fitting)


class Generated(Questions):
    """Answers are what the model generates after the prompt."""

    unit = "example"

    def __init__(
        self,
        backend: Backend,
        tokenizer: "PreTrainedTokenizerBase",
        task: Task,
        examples: list[Example],
        prompts: list[str],
        chat: ChatPrompts | None,
    ) -> None:
        super().__init__(task, examples, prompts)
        self.tokenizer, self.ids = tokenizer, encode_prompts(prompts, tokenizer, chat is not None)
        self.stop = () if chat is None or chat.end_of_turn is None else (chat.end_of_turn,)
        limit = float("inf") if backend.context is None else backend.context - task.max_new_tokens
        lengths = [len(ids) for ids in self.ids]
        self._plan(lengths, limit, lambda fit: backend.plan([lengths[i] for i in fit], task.max_new_tokens))

    def asked(self) -> Any:
        return [self.task.max_new_tokens, self.ids, *self.stop]

    def cost(self, batch: Batch) -> int:
        return sum(len(self.ids[i]) + self.task.max_new_tokens for i in batch.indices)

    def size(self, batch: Batch) -> int:
        return len(batch.indices)

    def ask(self, backend: Backend, batch: Batch, on_finished: Callable[[], Any]) -> list[str]:
        ids = [self.ids[i] for i in batch.indices]
        answers = backend.generate(ids, self.task.max_new_tokens, batch.rows, on_finished, *self.stop)
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]

    def read(self, i: int, said: str) -> tuple[str, dict[str, Any]]:
        return said, {}

    def excess(self, i: int) -> str:
        return (
            f"the prompt's {len(self.ids[i])} tokens and {self.task.max_new_tokens} new ones exceed the model's context"
        )


class Options(Questions):
    """The answer is the option to which the model gives the highest log-probability after the prompt."""

    unit = "option"

    def __init__(
        self,
        backend: Backend,
        tokenizer: "PreTrainedTokenizerBase",
        task: Task,
        choice: MultipleChoice,
        examples: list[Example],
        prompts: list[str],
        chat: ChatPrompts | None,
    ) -> None:
        super().__init__(task, examples, prompts)
        self.normalised = choice.length_normalised
        self.options = [list(choice.options(example)) for example in examples]
        blanks = None if chat is None else chat.blanks
        self.sequences = encode_options(prompts, self.options, tokenizer, task.name, blanks)
        lengths = [[len(ids) for ids, _ in of] for of in self.sequences]
        limit = float("inf") if backend.context is None else backend.context
        self._plan(list(map(max, lengths)), limit, lambda fit: backend.plan_options([lengths[i] for i in fit]))

    def asked(self) -> Any:
        return self.sequences

    def cost(self, batch: Batch) -> int:
        return sum(len(ids) for i in batch.indices for ids, _ in self.sequences[i])

    def size(self, batch: Batch) -> int:
        return sum(len(self.sequences[i]) for i in batch.indices)

    def ask(self, backend: Backend, batch: Batch, on_finished: Callable[[], Any]) -> list[str]:
        found = iter(
            backend.log_likelihoods(
                [sequence for i in batch.indices for sequence in self.sequences[i]], batch.rows, on_finished
            )
        )
        return [json.dumps([next(found) for _ in self.sequences[i]]) for i in batch.indices]

    def read(self, i: int, said: str) -> tuple[str, dict[str, Any]]:
        tokens = [len(ids) - start for ids, start in self.sequences[i]]
        told = {"options": self.options[i], "option_tokens": tokens}
        if not said:
            return "", {**told, "log_likelihoods": None}
        sums: list[float] = json.loads(said)
        scores = [total / count for total, count in zip(sums, tokens, strict=True)] if self.normalised else sums
        best = max(range(len(scores)), key=scores.__getitem__)
        return self.options[i][best], {**told, "log_likelihoods": sums}

    def excess(self, i: int) -> str:
        longest = max(len(ids) for ids, _ in self.sequences[i])
        return f"the {longest} tokens of the prompt and its longest option exceed the model's context"


def encode_options(
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    task: str,
    blanks: Sequence[str] | None = None,
) -> list[list[Scored]]:
    """For each prompt, the tokens of prompt + option of all its options, and where the option begins.

    Blanks at a prompt's end are taken for the beginning of every option, as most tokenizers join a blank to the word
    after it: "Answer: " + "Lima" is scored as " Lima" after "Answer:". blanks: of chats, whose template has written the
    prompts, the blanks it writes before an answer; an option's own count no more. UserError: an option without a token.
    """
    if blanks is None:
        heads = [prompt.rstrip() for prompt in prompts]
        starts = [prompt[len(head) :] for prompt, head in zip(prompts, heads, strict=True)]
    else:
        heads, starts = list(prompts), list(blanks)
        options = [[option.strip() for option in of] for of in options]
    pairs = [(head, start + option) for head, start, of in zip(heads, starts, options, strict=True) for option in of]
    chat = blanks is not None
    encoded = iter(encode_pairs([head for head, _ in pairs], [tail for _, tail in pairs], tokenizer, chat))
    found = [[next(encoded) for _ in of] for of in options]
    for number, of in enumerate(found, 1):
        for ids, start in of:
            if not 0 < start < len(ids):
                raise UserError(f"task {task}, question {number}: the prompt or an option has no token of its own")
    return found


def prepare(
    backend: Backend, tokenizer: "PreTrainedTokenizerBase", task: Task, data_dir: str | Path, limit: int | None
) -> Questions:
    """The first `limit` questions of a task. UserError: there is none, what `load_examples` and `ChatPrompts` find."""
    examples = load_examples(task, "test", data_dir)[:limit]
    if not examples:
        raise UserError(f"task {task.name}: its test set is empty; there is nothing to score")
    chat = None if task.chat is None else ChatPrompts(task, examples, tokenizer)
    prompts = [task.prompt(example) for example in examples] if chat is None else chat.texts
    if task.multiple_choice is not None:
        return Options(backend, tokenizer, task, task.multiple_choice, examples, prompts, chat)
    return Generated(backend, tokenizer, task, examples, prompts, chat)
