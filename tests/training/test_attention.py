"""Packed rows compute what padded batches and single sequences do, under every engine."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_runs import TinyRuns, assert_same_curve, losses
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MistralConfig, MistralForCausalLM

from neuroada import NeuroAdaConfig
from neuroada.config.recipe import load_recipe
from neuroada.hf import attention
from neuroada.hf.attention import choose_attention, describe_attention
from neuroada.hf.attention_sinks import has_sinks
from neuroada.objectives.cross_entropy import answer_loss
from neuroada.objectives.micro_batch import collate


class RandomSequences:
    """Prompts and answers of random lengths, down to one token of each."""

    def __init__(self, seed: int, count: int, vocabulary: int = 258) -> None:
        draw = np.random.default_rng(seed)
        self.starts = draw.integers(1, 30, count)
        self.lengths = self.starts + draw.integers(1, 30, count)
        self.num_answer_tokens = self.lengths - self.starts
        self.rows = [draw.integers(2, vocabulary, length) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, index: int) -> np.ndarray:
        return self.rows[index]

    def answer_start(self, index: int) -> int:
        return int(self.starts[index])


@pytest.fixture(scope="module")
def models(tiny: Path) -> dict[str, torch.nn.Module]:
    """The same adapted model twice, for packed and for padded batches; its deltas are not zero."""
    found = {}
    for name in ("packed_sdpa", "sdpa"):
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation=name)
        torch.manual_seed(0)
        found[name] = get_peft_model(base, NeuroAdaConfig(k=4)).train()
        for param in found[name].parameters():
            if param.requires_grad:
                torch.nn.init.normal_(param, std=0.05)
    return found


def loss_and_gradients(model: torch.nn.Module, data: RandomSequences, packing: bool) -> tuple[float, torch.Tensor]:
    batch = collate(data, np.arange(len(data)), packing, pad_id=1)
    model.zero_grad()
    loss = answer_loss(model, batch) / int(data.num_answer_tokens.sum())
    loss.backward()
    gradients = [param.grad.flatten() for param in model.parameters() if param.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(models: dict, seed: int, checkpointing: bool) -> None:
    data = RandomSequences(seed, count=1 + 2 * seed)
    expected, expected_gradients = loss_and_gradients(models["sdpa"], data, packing=False)
    if checkpointing:
        models["packed_sdpa"].gradient_checkpointing_enable({"use_reentrant": False})
        models["packed_sdpa"].enable_input_require_grads()
    found, gradients = loss_and_gradients(models["packed_sdpa"], data, packing=True)
    models["packed_sdpa"].gradient_checkpointing_disable()
    assert found == pytest.approx(expected, rel=1e-5)
    assert (gradients - expected_gradients).norm() <= 1e-5 * expected_gradients.norm()


def test_a_sequence_does_not_see_its_neighbours(models: dict) -> None:
    data = RandomSequences(0, 5)
    row = collate(data, np.arange(5), packing=True, pad_id=1).inputs
    with torch.no_grad():
        packed = models["packed_sdpa"](input_ids=row["input_ids"], position_ids=row["position_ids"]).logits[0]
        for tokens, found in zip(data.rows, packed.split(data.lengths.tolist()), strict=True):
            alone = models["sdpa"](input_ids=torch.from_numpy(tokens)[None]).logits[0]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_no_mask_of_the_whole_row_is_built(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_mask", lambda *_, **__: pytest.fail("built a mask"))
    loss_and_gradients(models["packed_sdpa"], RandomSequences(1, 5), packing=True)


def test_padded_batches_and_generation_are_those_of_sdpa(models: dict) -> None:
    data = RandomSequences(2, 4)
    batch = collate(data, np.arange(4), packing=False, pad_id=1).inputs
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    for inputs in (batch, left, {"input_ids": batch["input_ids"][:1]}):
        with torch.no_grad():
            found, expected = (models[name](**inputs).logits for name in ("packed_sdpa", "sdpa"))
        assert found.equal(expected)
    found, expected = (models[name].generate(**left, max_new_tokens=5) for name in ("packed_sdpa", "sdpa"))
    assert found.equal(expected)


def test_a_sliding_window_shorter_than_the_row() -> None:
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=6)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    packed_model = copy.deepcopy(model)
    packed_model.set_attn_implementation("packed_sdpa")
    data = RandomSequences(3, 3)
    row = collate(data, np.arange(3), packing=True, pad_id=1).inputs
    with torch.no_grad():
        packed = packed_model(**{**row, "logits_to_keep": 0}, use_cache=False).logits[0]
        for tokens, found in zip(data.rows, packed.split(data.lengths.tolist()), strict=True):
            torch.testing.assert_close(found, model(input_ids=torch.from_numpy(tokens)[None]).logits[0])


@pytest.mark.parametrize("window", [6, 128])
def test_attention_sinks(window: int) -> None:
    """Of gpt-oss: packed and padded rows against transformers' own eager attention, sequence by sequence."""
    torch.manual_seed(0)
    config = GptOssConfig(vocab_size=258, hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                          pad_token_id=1, sliding_window=window)  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model.set_attn_implementation("eager")
    packed_model = copy.deepcopy(model)
    packed_model.set_attn_implementation("packed_sinks")
    data = RandomSequences(3, 3)
    row, batch = (collate(data, np.arange(3), packing, pad_id=1).inputs for packing in (True, False))
    with torch.no_grad():
        packed = packed_model(**{**row, "logits_to_keep": 0}, use_cache=False).logits[0]
        padded = packed_model(**{**batch, "logits_to_keep": 0}).logits
        for i, found in enumerate(packed.split(data.lengths.tolist())):
            expected = model(input_ids=torch.from_numpy(data.rows[i])[None]).logits[0]
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(padded[i, : len(expected)], expected)
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    assert model.generate(**left, max_new_tokens=5).equal(packed_model.generate(**left, max_new_tokens=5))
    assert choose_attention(True, "bf16", torch.device("cuda"), has_sinks(config)) == "packed_sinks"


@pytest.mark.parametrize(
    "device, flash, overrides, expected, reason",
    [
        ("cpu", False, [], "packed_sdpa", ""),
        ("cpu", True, ["train.dtype=bf16"], "packed_sdpa", ""),
        ("cuda", True, ["train.dtype=bf16"], "flash_attention_2", ""),
        ("cuda", True, ["train.dtype=fp32"], "packed_sdpa", "no fp32"),
        ("cuda", False, ["train.dtype=bf16"], "packed_sdpa", "requirements-gpu.txt"),
        ("cuda", True, ["train.dtype=bf16", "train.packing=false"], "sdpa", ""),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, device: str, flash: bool, overrides: list[str], expected: str, reason: str
) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash)
    train = load_recipe("tiny_arithmetic", overrides).train
    assert choose_attention(train.packing, train.dtype, torch.device(device)) == expected
    description = describe_attention(train.packing, train.dtype, torch.device(device))
    assert description.startswith(expected) and reason in description


def test_every_engine_packed_learns_what_one_process_padded_does(tiny_runs: TinyRuns) -> None:
    expected = tiny_runs.add("padded", "single", 1, "train.packing=false", "train.micro_batch_size=4")
    packed = [
        tiny_runs.add(f"packed-{engine}-{checkpointing}", engine, ranks, "train.micro_batch_size=6",
                      f"train.activation_checkpointing={checkpointing}")
        for engine, ranks in (("single", 1), ("zero3", 2), ("fsdp2", 2)) for checkpointing in ("false", "true")
    ]  # fmt: skip
    tiny_runs.run()
    for folder in packed:
        assert_same_curve(losses(folder), losses(expected))
