"""How an answer is read out of a generation and compared with the gold one.

For each kind of answer there are two readers. `published_*` follow LLM-Adapters' and pyreft's evaluators to the letter,
so that scores compare with published tables; `sound_*` are the ones to believe. A reader returns None where it finds no
answer. Both see the generation alone, never the prompt.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from neuroada.tasks.prompts import COMMONSENSE_TRIGGER

Reader = Callable[[str], str | None]

TOLERANCE = 1e-3  # of the published comparison of numbers, absolute


def same_text(answer: str, gold: str) -> bool:
    """Whether `answer` is the gold answer to the character."""
    return answer == gold.strip()


def same_number(answer: str, gold: str) -> bool:
    """Whether two numbers agree within 1e-3. False where `gold` is a letter."""
    value = number(gold)
    return value is not None and abs(float(answer) - value) <= TOLERANCE


# ---- one of a few words: commonsense


def published_choice(generation: str) -> str | None:
    """Everything after the first "the correct answer is ", stripped: one more character than the answer is wrong."""
    _, found, after = generation.partition(COMMONSENSE_TRIGGER)
    return after.strip() if found else None


def sound_choice(choices: Sequence[str]) -> Reader:
    """A reader of one of `choices`, whole words in any case.

    The choice named right after the first "answer is" counts, whatever follows it (a model that never stops has
    answered all the same). Failing that, a generation that names exactly one of the choices has answered too; one that
    names several, as an echo of the question does, has not.
    """
    spelling = {choice.lower(): choice for choice in choices}
    word = rf"\b({'|'.join(map(re.escape, choices))})\b"
    explicit = re.compile(rf"\banswer\s+is\W*{word}", re.IGNORECASE)
    anywhere = re.compile(word, re.IGNORECASE)

    def read(generation: str) -> str | None:
        if found := explicit.search(generation):
            return spelling[found[1].lower()]
        named = {match.lower() for match in anywhere.findall(generation)}
        return spelling[named.pop()] if len(named) == 1 else None

    return read


# ---- numbers

_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")

# A sign and a currency in either order, digits with or without thousands' commas, a fraction or a mixed number
# ("2 1/2"). Not inside a word ("x2", "covid-19", "3rd"); the minus of a subtraction ("5-3") is no sign.
# (?>...) does not backtrack: "23rd" is not read as 2.
_NUMBER = re.compile(
    r"(?<![\w.])(?<![a-zA-Z]-)(?P<sign>(?<![)\]])[-−]\s?[$€£]?|[$€£]\s?[-−]?)?"
    r"(?>(?P<whole>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+))"
    r"(?>(?:\s(?P<numerator>\d+))?\s?/\s?(?P<denominator>\d+)(?![\d/.]))?"
    r"(?!(?:st|nd|rd|th)\b)"
)
_EXPLICIT_ANSWER = re.compile(
    r"\banswer(?:\s+in\s+arabic\s+numerals)?(?:\s+is\b|\s*[:=])(?P<gap>[\s:=*(\"'$\\]*)(?P<line>[^\n]*)", re.IGNORECASE
)
_NEXT_PROMPT = "### Instruction"


def _value(match: re.Match[str]) -> float | None:
    """The value of a match of _NUMBER; None for a division by zero."""
    value = float(match["whole"].replace(",", ""))
    if match["denominator"]:
        below = float(match["denominator"])
        if below == 0:
            return None
        value = value + float(match["numerator"]) / below if match["numerator"] else value / below
    return -value if match["sign"] and re.search("[-−]", match["sign"]) else value


def number(text: str) -> float | None:
    """The value of `text` if it is one number and nothing else ("-3.5", "1,234", "3/4"), else None."""
    match = _NUMBER.fullmatch(text.strip())
    return _value(match) if match else None


def published_number(generation: str) -> str | None:
    """The last match of -?\\d+\\.?\\d* once commas are dropped: "10-3" reads -3, "3/4" reads 4, "x2" reads 2."""
    found = _PUBLISHED_NUMBER.findall(generation.replace(",", ""))
    return found[-1] if found else None


def _stated(explicit: re.Match[str]) -> float | None:
    """The number that an "answer is ..." states: the one that follows at once, or that fills the next line alone.

    Of an equation ("the answer is 3 + 4 = 7") the right-hand side.
    """
    line = explicit["line"]
    first = _NUMBER.match(line)
    if first is None or ("\n" in explicit["gap"] and any(map(str.isalnum, line[first.end() :]))):
        return None
    sides = re.split(r"\.\s", line)[0].split("=")
    last = _NUMBER.search(sides[-1]) if len(sides) > 1 else first
    return _value(last or first)


def sound_number(generation: str) -> str | None:
    """The number that the last "answer is" (or "answer:") states, else the last number of the generation.

    A generation that goes on to pose itself the next problem is cut there.
    """
    generation = generation.partition(_NEXT_PROMPT)[0]
    for explicit in reversed(list(_EXPLICIT_ANSWER.finditer(generation))):
        if (value := _stated(explicit)) is not None:
            return repr(value)
    values = [value for match in _NUMBER.finditer(generation) if (value := _value(match)) is not None]
    return repr(values[-1]) if values else None


def first_line_number(generation: str) -> str | None:
    """The sound reading of the first line that holds a number: a bare sum, whatever a model that never stops adds."""
    return next((value for line in generation.splitlines() if (value := sound_number(line)) is not None), None)


# ---- a letter: AQuA


def published_letter(generation: str) -> str | None:
    """The first of A to E anywhere, inside words too: "Because..." reads B."""
    found = re.search("[A-E]", generation)
    return found[0] if found else None


def sound_letter(generation: str) -> str | None:
    """The last of A to E that stands alone: "(C)", "D.", "option B"."""
    found = re.findall(r"\b[A-E]\b", generation.partition(_NEXT_PROMPT)[0])
    return found[-1] if found else None


# ---- what a score has to beat


def majority(golds: Sequence[str]) -> float:
    """The accuracy of always giving the most frequent gold answer."""
    return max(Counter(golds).values()) / len(golds)


def majority_by_kind(golds: Sequence[str]) -> float:
    """The accuracy of always giving the most frequent gold answer of the kind that a commonsense prompt asks for.

    The kinds: true or false, and each word that the choices number ("solution1", "ending4"). Of one kind: `majority`.
    """
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for gold in golds:
        kinds["true or false" if gold in ("true", "false") else gold.rstrip("0123456789")][gold] += 1
    return sum(max(kind.values()) for kind in kinds.values()) / len(golds)


def zero(golds: Sequence[str]) -> float:
    """No constant answer is worth anything: free numbers, Matthews and Pearson correlation."""
    return 0.0
