"""Task files with a chat template: a question's tokens are those that training on chats gives the same turns."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Regex, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from neuroada.config.data import Data
from neuroada.data.chat import ChatTemplate
from neuroada.data.encoding import Encoder, Tokens
from neuroada.data.formats import Chat
from neuroada.data.task_file import load_task
from neuroada.errors import UserError
from neuroada.evaluation.evaluate import TransformersBackend, evaluate_tasks
from neuroada.evaluation.questions import Generated, Options, prepare
from neuroada.evaluation.source import resolve_tasks

sys.path.append(str(Path(__file__).parents[1] / "data"))
from chat_tokenizers import FAMILIES, TEMPLATES, build_tokenizer

ROWS = [
    {"country": "France", "capital": "Paris", "choices": [" Paris", "Lyon and Nice"]},
    {"country": "Peru", "capital": "Lima", "choices": ["Lima", "Cusco", "12"]},
]
WORDS = pre_tokenizers.Sequence(  # as of Llama-3 and Qwen: line ends are one piece, whatever follows them
    [
        pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
CHOICE = {"rule": "multiple_choice", "options": "choices"}


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Random weights, far from zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def write(tmp_path: Path):
    """Writes a task file over ROWS; returns its path."""

    def write(name: str = "capitals", rows: list = ROWS, **fields: object) -> str:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = {"path": str(data), "prompt": "The capital of {country}?", "target": "{capital}", "answer": "exact",
                "chat_template": "tokenizer", **fields}  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        return str(path)

    return write


@pytest.fixture(scope="module")
def chats():
    """A tokenizer with SmolLM2's template, and a random model with its tokens."""
    tokenizer = build_tokenizer("smollm2", vocab_size=300)
    return make_model(len(tokenizer)), tokenizer


def trained(tokenizer, answer: str, row: dict, system: str | None) -> Tokens:
    """What training makes of the question and an answer to it."""
    turns = [{"role": "user", "content": f"The capital of {row['country']}?"}, {"role": "assistant", "content": answer}]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    encoder = Encoder(tokenizer, Data(datasets=[{"path": "x"}]), 1000, ChatTemplate(tokenizer))
    ((unit,),) = encoder.encode([encoder.render(Chat(turns))])
    return unit[0]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_training(write, family, bos):
    tokenizer = build_tokenizer(family, bos=bos)
    tokenizer.backend_tokenizer.pre_tokenizer = WORDS
    backend = TransformersBackend(make_model(len(tokenizer)), tokenizer, 1000)
    system = None if family in ("gemma", "mistral") else "Be brief."
    more = {"system": system} if system else {}
    said = prepare(backend, tokenizer, load_task(write(**more)), "", None)
    chosen = prepare(backend, tokenizer, load_task(write(answer=CHOICE, **more)), "", None)
    assert isinstance(said, Generated) and isinstance(chosen, Options)
    for i, row in enumerate(ROWS):
        for option, (ids, start) in zip(row["choices"], chosen.sequences[i], strict=True):
            expected = trained(tokenizer, option.strip(), row, system)
            begin = int(expected.learnt.argmax())
            assert said.ids[i] == expected.ids[:begin].tolist()
            assert ids == expected.ids[: len(ids)].tolist()
            assert tokenizer.decode(ids[start:]).strip() == option.strip()
            assert begin == start or family == "qwen3"  # which writes an empty thought before every answer
            assert ids[:2].count(tokenizer.bos_token_id) <= 1
    stop = ChatTemplate(tokenizer).end_of_turn
    assert said.stop == (() if stop is None else (stop,))


def test_a_template_that_writes_bos_twice(write, tmp_path):
    tokenizer = build_tokenizer()
    (tmp_path / "twice.jinja").write_text("<s>" + (TEMPLATES / "mistral.jinja").read_text())
    backend = TransformersBackend(make_model(len(tokenizer)), tokenizer, 1000)
    for answer in ("exact", CHOICE):
        found = prepare(
            backend, tokenizer, load_task(write(answer=answer, chat_template=str(tmp_path / "twice.jinja"))), "", None
        )
        ids = found.ids[0] if isinstance(found, Generated) else found.sequences[0][0][0]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_scores_and_predictions(chats, write, tmp_path, monkeypatch):
    model, tokenizer = chats
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    seen: list[tuple] = []

    def generate(self, prompts, new, rows, on_finished, *stop):
        seen.append(stop)
        return [tokenizer(" Paris\n")["input_ids"] for _ in prompts]

    monkeypatch.setattr(TransformersBackend, "generate", generate)
    phi = str(TEMPLATES / "phi3.jinja")  # its end of turn is not this tokenizer's EOS
    tasks = [load_task(write("said", chat_template=phi)), load_task(write("chosen", answer=CHOICE))]
    results = evaluate_tasks(model, tokenizer, tasks, "nowhere", tmp_path / "out")["tasks"]
    assert seen == [(end,)] and results["said"]["sound"] == 0.5
    lines = (tmp_path / "out" / "predictions" / "said.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["prompt"] == "<|user|>\nThe capital of France?<|end|>\n<|assistant|>\n"
    (first, _) = map(json.loads, (tmp_path / "out" / "predictions" / "chosen.jsonl").read_text().splitlines())
    assert first["prompt"].endswith("The capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert first["options"] == ROWS[0]["choices"]


def test_it_stops_at_the_end_of_a_turn(chats):
    model, tokenizer = chats
    backend = TransformersBackend(model, tokenizer, 1000)
    prompt = tokenizer("The capital")["input_ids"]
    (free,) = backend.generate([prompt], 8, 1, lambda: None)
    (stopped,) = backend.generate([prompt], 8, 1, lambda: None, free[3])
    assert stopped == free[: free.index(free[3])]


def test_another_template_is_another_task(write, tmp_path):
    own = tmp_path / "own.jinja"
    versions = set()
    for text in ("a", "b"):
        own.write_text(text)
        versions.add(load_task(write(chat_template=str(own))).version)
    assert len(versions) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chat_template": "no.jinja"}, r"capitals.yaml: chat_template = no.jinja: no such file; write tokenizer, or "),
        ({"chat_template": None, "system": "Be brief."}, r"capitals.yaml: system: is a turn of a chat; set chat_templ"),
        ({"system": "{nation}"}, r"rows.jsonl, row 1: column 'nation' is missing"),
    ],
)
def test_a_wrong_file_is_one_line(write, fields, said):
    with pytest.raises(UserError, match=said) as error:
        resolve_tasks([write(**fields)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, r"capitals.yaml: chat_template = tokenizer: that of '.*' has none; give a .jinja file"),
        ("hello\n{% if %}", r"chat_template = .*own.jinja: question 1: the chat template fails in line 2: Expected"),
        ("{{ raise_exception('no system turn') }}", r"own.jinja: question 1: the chat template fails: no system turn"),
        ("{% if add_generation_prompt %}x{% endif %}", r"question 1: the chat template renders an answer otherwise"),
    ],
)
def test_a_template_that_fails_is_told_before_weights_are_read(write, tmp_path, template, said):
    from neuroada.cli import evaluate
    from neuroada.evaluation.after_training import check_tasks

    folder = tmp_path / "model"  # without weights
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if template is not None:
        (tmp_path / "own.jinja").write_text(template)
    path = write(answer=CHOICE, chat_template="tokenizer" if template is None else str(tmp_path / "own.jinja"))
    with pytest.raises(UserError, match=said) as error:
        evaluate.main(["--model", str(folder), "--tasks", path])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=said):
        check_tasks([path], "nowhere", str(folder))
