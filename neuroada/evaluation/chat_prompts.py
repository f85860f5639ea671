"""Questions of a task file as turns of a chat: a model tuned on chats is asked in the form that it was trained on."""

from collections.abc import Iterable, Sequence
from typing import Any

from neuroada.data.chat import ChatTemplate
from neuroada.data.formats import RowError
from neuroada.errors import UserError
from neuroada.tasks.table import Example, Task


class ChatPrompts:
    """The prompts of a task's questions, rendered with what the template writes before an answer.

    texts: what the model is given, of each question; of multiple choice with all that the template writes before an
    answer's text, less blanks. blanks: those, which tokenizers join to the word after them. end_of_turn: the token that
    ends an answer, beside the EOS. UserError naming the question: a template that is missing, or fails.
    """

    def __init__(self, task: Task, examples: Sequence[Example], tokenizer: Any) -> None:
        assert task.chat is not None
        template = ChatTemplate(tokenizer, task.chat.template, task.chat.field)
        self.texts: list[str] = []
        self.blanks: list[str] = []
        for number, example in enumerate(examples, 1):
            try:
                if task.multiple_choice is None:
                    given, lead = template.render(_turns(task, example), prompt=True), ""
                else:
                    given, lead = template.before_answer(_turns(task, example))
            except RowError as error:
                name = task.chat.template
                raise UserError(f"{task.chat.field} = {name}: question {number}: {error}") from None
            self.texts.append(given + lead.rstrip(" "))
            self.blanks.append(lead[len(lead.rstrip(" ")) :])
        self.end_of_turn = template.end_of_turn


def _turns(task: Task, example: Example) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": task.prompt(example)}]
    return [{"role": "system", "content": example["system"]}, *turns] if "system" in example else turns


def check_chat_prompts(tasks: Iterable[Task], model: str, field: str) -> None:
    """UserError where a question of `tasks` cannot be rendered for the model in the folder `model`, named by `field`.

    Its tokenizer alone is read, and only if a task needs it.
    """
    chats = [task for task in tasks if task.chat is not None]
    if not chats:
        return
    from neuroada.hf.loading import load_tokenizer

    tokenizer = load_tokenizer(model, field)
    for task in chats:
        assert task.generate is not None
        ChatPrompts(task, task.generate("test"), tokenizer)
