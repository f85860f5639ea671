"""Which tokens carry a loss, token by token: by hand for seven real templates, and against TRL's masks."""

from pathlib import Path

import pytest
from chat_tokenizers import FAMILIES, build_tokenizer

from neuroada.config.data import Data
from neuroada.data.chat import ChatTemplate
from neuroada.data.encoding import Encoder
from neuroada.data.formats import Chat, Completion, RowError, Text

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the sum?"},
    {"role": "assistant", "content": "Forty-six.\n\nNothing more."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Nothing."},
]
NO_SYSTEM = CHAT[1:]
"""For Gemma and TRL's Mistral, which take no system turn."""


def encode(tokenizer, example, max_length=512, template="tokenizer", **fields):
    data = Data.model_validate({"datasets": [{"path": "unused"}], "chat_template": template, **fields})
    chat = ChatTemplate(tokenizer, template) if tokenizer.chat_template or template != "tokenizer" else None
    encoder = Encoder(tokenizer, data, max_length, chat)
    (units,) = encoder.encode([encoder.render(example)])
    if isinstance(units, RowError):
        raise units
    return [unit[0] for unit in units]


def learnt_texts(tokenizer, tokens):
    """The runs of learnt tokens, as text."""
    runs, before = [], False
    for i, learnt in zip(tokens.ids.tolist(), tokens.learnt.tolist(), strict=True):
        if learnt:
            runs = [*runs[:-1], [*runs[-1], i]] if before else [*runs, [i]]
        before = learnt
    return [tokenizer.decode(run) for run in runs]


ENDS = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "qwen2_5": "<|im_end|>", "gemma": "<end_of_turn>",
        "phi3": "<|end|>"}  # fmt: skip


@pytest.mark.parametrize("family", ENDS)
def test_turns_and_their_end_are_learnt(family):
    tokenizer = build_tokenizer(family)
    messages = NO_SYSTEM if family == "gemma" else CHAT
    (tokens,) = encode(tokenizer, Chat(messages))
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    end = ENDS[family]
    assert learnt_texts(tokenizer, tokens) == [f"Forty-six.\n\nNothing more.{end}", f"Nothing.{end}"]


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize("eos", ["last", "none"])
def test_end_of_turn_tokens_by_train_on_eos(family, eos):
    tokenizer = build_tokenizer(family)
    (tokens,) = encode(tokenizer, Chat(NO_SYSTEM), train_on_eos=eos)
    end = ENDS[family] if eos == "last" else ""
    assert learnt_texts(tokenizer, tokens) == ["Forty-six.\n\nNothing more.", f"Nothing.{end}"]


@pytest.mark.parametrize("family", ENDS)
def test_last_assistant_and_all(family):
    tokenizer = build_tokenizer(family)
    (tokens,) = encode(tokenizer, Chat(NO_SYSTEM), train_on="last_assistant")
    assert learnt_texts(tokenizer, tokens) == [f"Nothing.{ENDS[family]}"]
    (tokens,) = encode(tokenizer, Chat(NO_SYSTEM), train_on="all")
    assert tokens.learnt.tolist() == [False] + [True] * (len(tokens) - 1)


def test_a_given_prompt_is_not_learnt():
    tokenizer = build_tokenizer("smollm2")
    (tokens,) = encode(tokenizer, Chat(CHAT, given=4))
    assert learnt_texts(tokenizer, tokens) == ["Nothing.<|im_end|>"]
    (tokens,) = encode(tokenizer, Chat(CHAT, given=2), train_on="completion")
    (whole,) = learnt_texts(tokenizer, tokens)
    assert whole.startswith("Forty-six.") and "And then?" in whole and whole.endswith("Nothing.<|im_end|>")


def test_mistral_moves_the_system_turn_so_each_turn_is_a_sequence_of_its_own():
    tokenizer = build_tokenizer("mistral")
    (tokens,) = encode(tokenizer, Chat(NO_SYSTEM))
    assert learnt_texts(tokenizer, tokens) == [" Forty-six.\n\nNothing more.</s>", " Nothing.</s>"]
    first, second = encode(tokenizer, Chat(CHAT))
    assert tokenizer.decode(first.ids).startswith("<s>[INST] Be brief.\n\nWhat is the sum?[/INST] Forty-six.")
    assert tokenizer.decode(second.ids).startswith("<s>[INST] What is the sum?[/INST]")
    assert learnt_texts(tokenizer, first) == [" Forty-six.\n\nNothing more.</s>"]
    assert learnt_texts(tokenizer, second) == [" Nothing.</s>"]


def test_qwen3_drops_earlier_reasoning_so_each_turn_is_a_sequence_of_its_own():
    tokenizer = build_tokenizer("qwen3")
    messages = [
        {"role": "user", "content": "What is the sum?"},
        {"role": "assistant", "content": "<think>\ntwelve and thirty-four\n</think>\n\nForty-six."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Nothing."},
    ]
    first, second = encode(tokenizer, Chat(messages))
    assert learnt_texts(tokenizer, first) == ["<think>\ntwelve and thirty-four\n</think>\n\nForty-six.<|im_end|>"]
    assert learnt_texts(tokenizer, second) == ["<think>\n\n</think>\n\nNothing.<|im_end|>"]
    assert "twelve and" not in tokenizer.decode(second.ids)
    # What is given is what the model will be given.
    for tokens, turns in ((first, messages[:1]), (second, messages[:3])):
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert tokens.ids[: len(prompt)].tolist() == prompt


def test_a_template_whose_answer_does_not_follow_its_generation_prompt_is_refused():
    tokenizer = build_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Your answer: {% endif %}"
    )
    with pytest.raises(RowError, match="otherwise than its generation prompt"):
        encode(tokenizer, Chat(CHAT))


def test_tools():
    tokenizer = build_tokenizer("qwen2_5")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 34}}}
    messages = [
        {"role": "user", "content": "What is the sum?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "46"},
        {"role": "assistant", "content": "Forty-six."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    (tokens,) = encode(tokenizer, Chat(messages, tools), max_length=2048)
    # Where a turn calls a tool and says nothing, the template writes the same line break as its generation prompt.
    assert learnt_texts(tokenizer, tokens) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 34}}\n</tool_call><|im_end|>',
        "Forty-six.<|im_end|>",
    ]
    assert '"name": "add", "parameters"' in tokenizer.decode(tokens.ids)


def test_a_template_without_an_end_of_turn_gets_an_eos():
    tokenizer = build_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tokens,) = encode(tokenizer, Chat(CHAT))
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert learnt_texts(tokenizer, tokens)[-1] == "Nothing.\n<|im_end|>"
    (tokens,) = encode(tokenizer, Chat(CHAT), train_on_eos="none")
    assert learnt_texts(tokenizer, tokens)[-1] == "Nothing.\n"


def test_a_token_across_the_beginning_of_an_answer_is_divided():
    tokenizer = build_tokenizer("smollm2")
    merged = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert len(merged) == 1  # or this test shows nothing
    messages = [CHAT[1], {"role": "assistant", "content": "\n\nForty-six."}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    (tokens,) = encode(tokenizer, Chat(messages))
    assert tokens.ids[: len(prompt)].tolist() == prompt
    assert not tokens.learnt[: len(prompt)].any() and tokens.learnt[len(prompt)]
    assert learnt_texts(tokenizer, tokens) == ["\n\nForty-six.<|im_end|>"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_plain_text_has_one_bos_and_one_eos(bos, eos):
    tokenizer = build_tokenizer(bos=bos, eos=eos)
    start = "<s>" if bos else ""
    (tokens,) = encode(tokenizer, Completion("What is the sum? ", "Forty-six."))
    assert tokenizer.decode(tokens.ids) == f"{start}What is the sum? Forty-six.</s>"
    assert learnt_texts(tokenizer, tokens) == ["Forty-six.</s>"]
    (tokens,) = encode(tokenizer, Text("Nothing more.</s>"))
    assert tokenizer.decode(tokens.ids) == f"{start}Nothing more.</s>"
    (tokens,) = encode(tokenizer, Text("<s>Nothing more."))
    assert tokens.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert tokens.learnt[1:].all()


def test_a_chat_whose_template_writes_bos_has_one():
    tokenizer = build_tokenizer("llama3", bos=True)
    (tokens,) = encode(tokenizer, Chat(CHAT))
    assert tokens.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_eos_is_learnt_where_it_is_the_pad_token_too():
    tokenizer = build_tokenizer("smollm2")
    tokenizer.pad_token = tokenizer.eos_token
    (tokens,) = encode(tokenizer, Chat(CHAT))
    ends = tokens.ids == tokenizer.pad_token_id
    assert ends.sum() == 5 and tokens.learnt[ends].tolist() == [False, False, True, False, True]


# ---- against TRL


def trl_template(family):
    """(the template as TRL's list of models has it, the marked one it trains with)."""
    chat_templates = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    return (chat_templates / f"{family}.jinja").read_text(), (chat_templates / f"{family}_training.jinja").read_text()


def trl_mask(tokenizer, messages, template):
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], [bool(value) for value in encoded["assistant_masks"]]


WRITTEN_BETWEEN = {"gemma": ["\n"], "phi3": ["\n", "</s>"], "qwen2_5": ["\n"], "llama3": []}
"""What TRL's marks enclose beside the turns and their ends: the template writes it, the model never says it."""


@pytest.mark.parametrize("family", WRITTEN_BETWEEN)
def test_masks_are_trls(family, tmp_path):
    tokenizer = build_tokenizer(family)
    plain, marked = trl_template(family)
    for messages in (NO_SYSTEM, CHAT) if family != "gemma" else (NO_SYSTEM,):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == tokenizer.apply_chat_template(messages, tokenize=False, chat_template=plain)  # the real one
        ids, expected = trl_mask(tokenizer, messages, marked)

        # By the marks: the same.
        (tmp_path / "marked.jinja").write_text(marked)
        (tokens,) = encode(tokenizer, Chat(messages), template=str(tmp_path / "marked.jinja"))
        assert (tokens.ids.tolist(), tokens.learnt.tolist()) == (ids, expected)

        # By rendering: the same but for what stands between the turns.
        (tokens,) = encode(tokenizer, Chat(messages))
        assert tokens.ids.tolist() == ids
        unlike = [i for i, learnt, wanted in zip(ids, tokens.learnt, expected, strict=True) if learnt != wanted]
        assert all(not learnt or wanted for learnt, wanted in zip(tokens.learnt, expected, strict=True))
        assert {tokenizer.decode([i]) for i in unlike} == set(WRITTEN_BETWEEN[family])


@pytest.mark.parametrize("family", ["smollm2", "mistral"])
def test_masks_are_those_of_marks_where_trl_has_no_template(family):
    tokenizer = build_tokenizer(family)
    marked = tokenizer.chat_template
    if family == "smollm2":
        marked = marked.replace(
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{%- generation %}"
            "{{- message.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}"
            "{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}",
        )
    else:
        marked = marked.replace(
            "{{- ' ' + message.content + eos_token }}",
            "{%- generation %}{{- ' ' + message.content + eos_token }}{%- endgeneration %}",
        )
    assert "generation" in marked.replace("add_generation_prompt", "")
    ids, expected = trl_mask(tokenizer, NO_SYSTEM, marked)
    (tokens,) = encode(tokenizer, Chat(NO_SYSTEM))
    assert (tokens.ids.tolist(), tokens.learnt.tolist()) == (ids, expected)


def test_qwen3_against_trl():
    """TRL trains Qwen3 with a template that keeps the reasoning of all turns; a single turn is the same in both."""
    tokenizer = build_tokenizer("qwen3")
    plain, marked = trl_template("qwen3")
    messages = NO_SYSTEM[:2]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=plain
    )
    ids, expected = trl_mask(tokenizer, messages, marked)
    (tokens,) = encode(tokenizer, Chat(messages))
    assert tokens.ids.tolist() == ids
    unlike = [i for i, learnt, wanted in zip(ids, tokens.learnt, expected, strict=True) if learnt != wanted]
    assert {tokenizer.decode([i]) for i in unlike} <= {"\n"}


def test_every_family_has_its_template():
    assert set(FAMILIES) >= {*ENDS, "mistral", "qwen3"}
