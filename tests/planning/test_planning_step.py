"""The recorded step: the repeated middle layer equals all layers recorded; a real run counts the same bytes."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from neuroada.config.recipe import Recipe
from neuroada.methods import make_method
from neuroada.planning import step as planning_step
from neuroada.planning.step import record_step
from neuroada.planning.strategies import STRATEGIES, memory
from neuroada.planning.traffic import step_flops

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_config(layers: int, **changed) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128, max_position_embeddings=256, **changed)


def tiny_recipe(**train) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "tiny",
            "task": "arithmetic",
            "adapter": {"k": 4, "target_modules": TARGETS},
            "optimizer": {"lr": 1e-3},
            "train": {"global_batch_size": 2, "micro_batch_size": 2, "max_length": 48, **train},
            "output_dir": "runs/tiny",
            "provenance": "made for tests",
        }
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulating", [False, True])
def test_repeating_the_middle_layer_equals_recording_all(monkeypatch, checkpointing, accumulating):
    recipe, config = tiny_recipe(activation_checkpointing=checkpointing), tiny_config(7)
    short = record_step(recipe, config, accumulating)
    monkeypatch.setattr(planning_step, "RECORDED_LAYERS", 7)
    whole = record_step(recipe, config, accumulating)
    assert short.params == whole.params
    for strategy in STRATEGIES:
        for options in (
            {"zero_hpz_partition_size": 2},
            {"zero_hpz_partition_size": 2, "stage3_max_reuse_distance": 30_000, "stage3_prefetch_bucket_size": 20_000},
        ):
            assert memory(short, strategy, 4, options) == memory(whole, strategy, 4, options), strategy


def test_parameters_by_kind():
    recipe, config = tiny_recipe(), tiny_config(3)
    step = record_step(recipe, config, accumulating=False)
    rows = 3 * (64 + 32 + 32 + 64 + 192 + 192 + 64)
    numel = {kind: sum(p.numel for p in step.params if p.kind == kind) for kind in ("idx", "delta")}
    assert numel == {"idx": 8 * rows, "delta": 4 * rows}
    held = memory(step, "single", 1).by_kind
    assert (held["idx"], held["delta"]) == (8 * rows, 16 * rows)  # uint8, fp32
    assert held["optimizer"] == 32 * rows


def test_a_dense_copy_of_a_weight_would_be_seen(monkeypatch):
    """The plan runs the real layer: one that kept W + delta for backward would show, a weight's bytes a layer."""
    from neuroada.adapter import layer

    recipe, config = tiny_recipe(), tiny_config(3)
    before = memory(record_step(recipe, config, False), "single", 1).by_kind["activations"]

    def dense(x, weight, bias, idx, delta, weight_format):
        return torch.nn.functional.linear(x, weight + delta.sum() * weight, bias)

    monkeypatch.setattr(layer, "in_weight_linear", dense)
    after = memory(record_step(recipe, config, False), "single", 1).by_kind["activations"]
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 192 * 3)  # of the upper two layers
    assert after - before >= 2 * weights


def test_a_strategy_cuts_what_it_says():
    step = record_step(tiny_recipe(), tiny_config(4), accumulating=False)
    options = {"overlap_comm": True, "reduce_bucket_size": 1000}
    one, zero2 = memory(step, "single", 1).by_kind, memory(step, "zero2", 4, options).by_kind
    assert zero2["weights"] == one["weights"]
    assert zero2["optimizer"] == one["optimizer"] // 4 * 3 // 2  # a master copy besides the moments
    for strategy in ("zero3", "fsdp2"):
        cut = memory(step, strategy, 4, options).by_kind
        for kind in ("weights", "idx", "delta"):
            assert cut[kind] == one[kind] // 4, (strategy, kind)
    offloaded = memory(step, "zero3_offload", 4, options)
    assert offloaded.by_kind["weights"] == offloaded.by_kind["optimizer"] == 0
    assert offloaded.host_bytes > one["weights"] // 4


@pytest.mark.parametrize(
    ("method", "bytes_of_an_entry"), [("shira", 8), ("random_entries", 8), ("supertuning", 4), ("neuroada", 0)]
)
def test_indices_that_are_no_parameters_are_whole_on_every_rank(method, bytes_of_an_entry):
    recipe = tiny_recipe()
    step = record_step(recipe, tiny_config(4), False, make_method(recipe, method))
    assert step.whole_indices == bytes_of_an_entry * step.trainable
    if step.whole_indices:
        held = {strategy: memory(step, strategy, 4).by_kind["idx"] for strategy in STRATEGIES}
        assert set(held.values()) == {step.whole_indices}


def mixture_config(layers: int, **changed) -> Qwen3MoeConfig:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128}  # fmt: skip
    return Qwen3MoeConfig(**sizes, num_hidden_layers=layers, **changed)


def test_a_mixture_s_layers_are_not_all_alike():
    """A dense first layer is no picture of those with experts: then all are recorded."""
    recipe = tiny_recipe()
    recipe.adapter.target_modules, recipe.adapter.target_parameters = ["q_proj"], ["experts.gate_up_proj"]
    for dense, recorded in (([], 3), ([4], 5)):
        step = record_step(recipe, mixture_config(5, mlp_only_layers=dense), accumulating=False)
        assert {param.layer for group in step.groups for param in group} == {None, *range(recorded)}


def test_a_token_meets_the_experts_that_its_router_chose():
    recipe, config = tiny_recipe(), mixture_config(3)
    recipe.adapter.target_modules, recipe.adapter.target_parameters = ["q_proj"], ["experts.down_proj"]
    one, two = (
        step_flops(recipe, config, record_step(recipe, config, False))
        for config.num_experts_per_tok in (1, 2)  # type: ignore[attr-defined]
    )
    expert = 3 * 48 * 64
    assert two - one == 2 * 48 * 3 * (4 * expert + 2 * 4 * 64)  # sequences, tokens, layers; weights and deltas


@pytest.mark.parametrize(
    ("model", "base"),
    [(LlamaForCausalLM, None), (LlamaForCausalLM, "nf4"), (Qwen3MoeForCausalLM, None)],
    ids=["llama", "llama-nf4", "qwen3_moe"],
)
def test_plan_equals_a_real_run(tmp_path, monkeypatch, model, base):
    """One process and a tiny model; benchmarks/plan_check.py does the same for every engine."""
    config = tiny_config(4) if model is LlamaForCausalLM else mixture_config(4)
    model(config).to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    planned, counted = importlib.import_module("plan_check").check(str(tmp_path), "single", 1, base=base)
    assert abs(planned / counted - 1) < 0.1
