"""A mixture of experts in two ranks: losses, connections and merged bits are those of one process, bytes the plan's."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import ENGINES, run_ranks
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from neuroada.config.recipe import load_recipe
from neuroada.hf.loading import load_config
from neuroada.planning.step import Step, record_step
from neuroada.planning.strategies import memory

EXPERTS = ["adapter.target_parameters=[experts.gate_up_proj, experts.down_proj]",
           "adapter.target_modules=[q_proj, v_proj]"]  # fmt: skip

MODELS = ("qwen", "gpt-oss", "mixtral")
METHODS = {"shira": 2 * (64 + 48), "supertuning": 2 * (102 + 51)}
"""PEFT's, beside experts that stay as they are -> values of two layers' q_proj [32, 32] and v_proj [16, 32]."""


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def found(tmp: Path) -> dict[str, list[dict]]:
    """model, engine and number of ranks -> what each rank said."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "vocab_size": 258, "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=24)).save_pretrained(tmp / "qwen")
    gpt = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=4, intermediate_size=24, pad_token_id=1))
    for layer in gpt.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    gpt.save_pretrained(tmp / "gpt-oss")  # [experts, in, out], with biases and attention sinks
    mixtral = MixtralConfig(**sizes, num_local_experts=4, intermediate_size=24)
    MixtralForCausalLM(mixtral).save_pretrained(tmp / "mixtral")
    for ranks in (1, 2, 3):
        engines = {1: ["single"], 2: ["zero2", "zero3", "fsdp2"], 3: ["fsdp2"]}[ranks]
        fields = [*EXPERTS, f"output_dir={tmp / 'run'}"]
        cases = {
            f"{model} {engine}": [*ENGINES[engine], *fields, f"model={tmp / model}"]
            for model in (MODELS if ranks < 3 else ["mixtral"])
            for engine in engines
        }
        if ranks == 2:
            sparse = ["adapter.target_modules=[q_proj, v_proj]", "adapter.rank=1", "adapter.sparsity=0.9"]
            cases |= {
                f"{method} {engine}": [*ENGINES[engine], *sparse, f"adapter.method={method}", *fields[-1:],
                                       f"model={tmp / 'qwen'}"]
                for method in METHODS for engine in ("zero3", "fsdp2")
            }  # fmt: skip
        run_ranks(ranks, "sharding/ranks_sharding.py", {"out": str(tmp / "out"), "cases": cases}, tmp)
    return {
        f"{ranks.parent.name} {ranks.name}": [json.loads(path.read_text()) for path in sorted(ranks.iterdir())]
        for ranks in (tmp / "out").glob("*/*")
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_two_ranks_are_one_process(found, engine: str, model: str) -> None:
    (alone,) = found[f"{model} single 1"]
    assert alone["losses"][-1] < alone["losses"][0]
    assert all(alone["in place"].values()), alone["in place"]
    assert len(found[f"{model} {engine} 2"]) == 2
    for said in found[f"{model} {engine} 2"]:
        assert said["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert said["fingerprint"] == alone["fingerprint"]
        assert all(said["in place"].values()), said["in place"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_rank_stores_half_of_the_experts(found, engine: str, model: str) -> None:
    (alone,) = found[f"{model} single 1"]
    for said in found[f"{model} {engine} 2"]:
        for kind in ("idx", "delta"):
            assert said["stored"][kind] == alone["stored"][kind] // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_rank_stores_half_of_a_method_s_values(found, engine: str, method: str) -> None:
    """A vector a layer: an odd one is padded, or leaves the last rank one less."""
    held = [said["trained"] for said in found[f"{method} {engine} 2"]]
    assert len(held) == 2
    assert max(held) <= METHODS[method] * 4 // 2 + 4 * 4
    assert sum(held) >= METHODS[method] * 4


@pytest.fixture(scope="module")
def planned(tmp: Path, found) -> dict[str, Step]:
    """The step that a plan records, by model."""
    steps = {}
    for model in MODELS:
        recipe = load_recipe("tiny_arithmetic", [*EXPERTS, f"model={tmp / model}", "train.micro_batch_size=1"])
        steps[model] = record_step(recipe, load_config(recipe.model), accumulating=True)
    return steps


@pytest.mark.parametrize(
    ("model", "engine", "ranks"),
    [(model, *case) for model in MODELS for case in (("single", 1), ("zero3", 2), ("fsdp2", 2))]
    + [("mixtral", "fsdp2", 3)],
)
def test_a_plan_s_bytes_are_those_a_rank_stores(found, planned, model: str, engine: str, ranks: int) -> None:
    """Three ranks and four experts: FSDP2 stores two whole ones on the fullest rank, and on another none."""
    plan = memory(planned[model], engine, ranks).by_kind
    said = found[f"{model} {engine} {ranks}"]
    for kind in ("weights", "idx", "delta"):
        assert plan[kind] == pytest.approx(max(one["stored"][kind] for one in said), rel=0.1), kind
    assert plan["optimizer"] == pytest.approx(max(one["moments"] + one["master"] for one in said), rel=0.1)
    gradients = plan["delta" if engine == "fsdp2" else "gradients"]  # there with a layer's whole ones, for a while
    assert max(one["gradients"] for one in said) == pytest.approx(gradients, rel=0.1)
