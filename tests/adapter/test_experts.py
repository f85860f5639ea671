"""Experts in three dimensions: k connections of every neuron of every expert, equal to dense W + delta by autograd."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import layer_indices
from torch import nn
from torch.func import functional_call
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from neuroada import NeuroAdaConfig, hotswap_adapter
from neuroada.errors import UserError

K, EXPERTS = 3, ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "vocab_size": 64, "num_experts_per_tok": 2}  # fmt: skip
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24)).eval()


def gpt_oss() -> nn.Module:
    """Stored [experts, in, out], with biases."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "intermediate_size": 24, "pad_token_id": 0, "layer_types": None}
    return GptOssForCausalLM(GptOssConfig(**sizes)).eval()


BASES = pytest.mark.parametrize("make", [qwen, gpt_oss])


def attach(base: nn.Module, **changes) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=K, target_parameters=EXPERTS, **changes)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def train(model: nn.Module, steps: int = 2) -> PeftModel:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@BASES
def test_equal_to_dense_weights_by_autograd(make) -> None:
    """Eight steps: losses, and deltas to the end."""
    base = make()
    tuned = attach(base)
    layers = tuned.base_model.adapted_layers("default")
    assert len(layers) == 4
    deltas = [torch.zeros_like(layer.neuroada_delta["default"], requires_grad=True) for layer in layers]

    def dense_loss() -> torch.Tensor:
        changed = {}
        for layer, delta in zip(layers, deltas, strict=True):
            weight = base.get_parameter(layer.name).detach()
            swapped = weight.transpose(1, 2) if make is gpt_oss else weight
            change = torch.zeros_like(swapped).scatter(2, layer_indices(layer), delta)
            changed[layer.name] = weight + (change.transpose(1, 2) if make is gpt_oss else change)
        return functional_call(base, changed, kwargs={"input_ids": IDS, "labels": IDS}).loss

    ours = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.AdamW(deltas, lr=1e-2)
    for _ in range(8):
        loss, expected = tuned(input_ids=IDS, labels=IDS).loss, dense_loss()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for made, optimizer in ((loss, ours), (expected, theirs)):
            optimizer.zero_grad()
            made.backward()
        for layer, delta in zip(layers, deltas, strict=True):
            torch.testing.assert_close(layer.neuroada_delta["default"].grad, delta.grad, rtol=1e-4, atol=1e-7)
        ours.step()
        theirs.step()


@BASES
def test_a_neuron_is_an_output_of_one_expert(make) -> None:
    base = make()
    tuned = attach(base)
    for layer in tuned.base_model.adapted_layers("default"):
        weight = base.get_parameter(layer.name).detach()
        weight = weight.transpose(1, 2) if make is gpt_oss else weight
        experts, out_features, _ = weight.shape
        strongest = weight.abs().topk(K, 2).indices.sort(2).values
        assert layer_indices(layer).equal(strongest)
        assert layer.neuroada_delta["default"].shape == (experts, out_features, K)
    out_features = 2 * (48 + 32) * 4
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == out_features * K


@BASES
def test_disable_save_load_switch_unload(make, tmp_path: Path) -> None:
    base = make()
    tuned = train(attach(base))
    adapted = logits(tuned)
    with tuned.disable_adapter():
        assert logits(tuned).equal(logits(base))
    assert logits(tuned).equal(adapted)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert logits(loaded).equal(adapted)
    tuned.add_adapter("other", NeuroAdaConfig(k=1, selection="random", target_parameters=EXPERTS[:1]))
    tuned.set_adapter("other")
    assert len(tuned.base_model.adapted_layers("other")) == 2
    torch.testing.assert_close(logits(tuned), logits(base), rtol=1e-5, atol=1e-6)
    tuned.set_adapter("default")
    assert logits(tuned).equal(adapted)
    plain = dict(base.named_parameters())
    for name, param in tuned.unload().named_parameters():
        assert param.equal(plain[name]), name


def test_experts_and_modules_together() -> None:
    tuned = train(attach(qwen(), target_modules=["q_proj"]))
    names = {layer.name.rpartition(".")[2] for layer in tuned.base_model.adapted_layers("default")}
    assert names == {"q_proj", "gate_up_proj", "down_proj"}
    assert all(not param.requires_grad for name, param in tuned.named_parameters() if ".gate.weight" in name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_parameters": ["experts.up"]}, "'experts.up' matches no parameter"),
        ({"target_parameters": ["mlp.gate.weight"]}, "gate.weight is no weight"),
        ({"target_parameters": EXPERTS, "k": 33}, "k = 33: .* has only 32 inputs"),
        ({"target_parameters": EXPERTS, "selection": "gradient"}, "selection = 'gradient'"),
        ({"target_parameters": "experts.down_proj"}, "must be a list"),
    ],
)
def test_what_is_not_served_is_refused(config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_peft_model(qwen(), NeuroAdaConfig(**{"k": K, **config}))


@BASES
def test_another_s_file_takes_an_adapter_s_place(make, tmp_path: Path) -> None:
    base = make()
    other, model = train(attach(base)).eval(), attach(base)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    assert logits(model).equal(logits(other)) and not logits(model).equal(logits(base))
    fewer = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=K - 1, target_parameters=EXPERTS))
    with pytest.raises(UserError, match=f"are {K} of a neuron, those of 'default' {K - 1}"):
        hotswap_adapter(fewer, str(tmp_path / "other"), "default")
