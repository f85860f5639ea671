import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from neuroada.evaluation import generate as module
from neuroada.evaluation.generate import Batch, generate, plan_batches, stop_tokens

NEVER = frozenset()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """20 prompts of 1 to 30 tokens, in no order of length."""
    random = torch.Generator().manual_seed(1)
    lengths = [7, 1, 30, 12, 2, 19, 5, 25, 3, 16, 1, 9, 28, 4, 11, 6, 22, 2, 14, 8]
    return [torch.randint(1, 256, (n,), generator=random).tolist() for n in lengths]


def alone(model, prompt: list[int], max_new_tokens: int, stop_ids=NEVER) -> list[int]:
    """The textbook: the whole sequence through the model for every token; no cache, no padding, no batch."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [alone(model, prompt, 24) for prompt in prompts]


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 20, 64])
def test_batched_equals_alone_in_order(model, prompts, expected, rows):
    assert generate(model, prompts, 24, NEVER, rows) == expected


@pytest.mark.parametrize("rows", [5, 20])
def test_prefill_in_small_groups(model, prompts, expected, rows, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 40)
    assert generate(model, prompts, 24, NEVER, rows) == expected


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_stops_at_any_stop_id_and_leaves_it_out(model, prompts, expected, rows):
    # tokens that really occur, at different places of different answers
    stop_ids = {expected[0][3], expected[2][10], expected[5][0]}
    cut = [answer[: min([answer.index(s) for s in stop_ids if s in answer], default=24)] for answer in expected]
    assert len({len(answer) for answer in cut}) > 3
    assert generate(model, prompts, 24, stop_ids, rows) == cut


def test_the_test_can_fail_without_the_mask(model, prompts, expected, monkeypatch):
    forward = type(model).forward

    def maskless(self, attention_mask, **inputs):
        return forward(self, attention_mask=torch.ones_like(attention_mask), **inputs)

    monkeypatch.setattr(type(model), "forward", maskless)
    assert generate(model, prompts, 24, NEVER, 20) != expected


def test_equals_transformers_generate(model, prompts, expected):
    for prompt, answer in zip(prompts[:6], expected, strict=False):
        ids = torch.tensor([prompt])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert found[0, len(prompt) :].tolist() == answer


def test_sliding_window(prompts):
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
            initializer_range=0.3,
        )
    ).eval()
    assert generate(model, prompts, 16, NEVER, 6) == [alone(model, prompt, 16) for prompt in prompts]


def test_a_long_answer_does_not_hold_the_finished_rows(model, prompts, expected, monkeypatch):
    """Only rows that still run are decoded, and a freed row is filled again."""
    sizes = []
    step = module._Rows.step
    monkeypatch.setattr(module._Rows, "step", lambda rows, model: (sizes.append(len(rows.last)), step(rows, model))[1])
    stop_ids = {answer[1] for answer in expected[1:]} - set(expected[0])
    answers = generate(model, prompts, 24, stop_ids, 4)
    assert answers[0] == expected[0]
    assert max(sizes) == 4
    assert sum(sizes) == sum(len(answer) + (len(answer) < 24) for answer in answers)  # not one step for nothing


def test_every_prompt_is_reported_finished_once(model, prompts):
    finished = []
    generate(model, prompts, 3, NEVER, 6, lambda: finished.append(1))
    assert len(finished) == len(prompts)
    assert generate(model, [], 3, NEVER, 6) == []


def test_plan_batches():
    lengths = [5, 90, 10, 40, 41, 7]
    batches = plan_batches(lengths, 10, 100)
    assert batches == [Batch((1, 4), 1), Batch((3, 2, 5, 0), 2)]
    assert plan_batches([500], 10, 100) == [Batch((0,), 1)]
    assert plan_batches([], 10, 100) == []
    for batch in plan_batches(list(range(1, 300)), 32, 1000):
        assert batch.rows * (32 + max(range(1, 300)[i] for i in batch.indices)) <= 1000


def test_stop_tokens(model, tokenizer, monkeypatch):
    assert stop_tokens(model, tokenizer) == {0}
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 9])
    assert stop_tokens(model, tokenizer) == {0, 7, 9}
