"""A mixture of experts in two ranks: losses, connections and merged bits are those of one process."""

import json

import pytest
import torch
from distributed_runs import ENGINES, run_ranks
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS = ["adapter.target_parameters=[experts.gate_up_proj, experts.down_proj]",
           "adapter.target_modules=[q_proj, v_proj]"]  # fmt: skip

MODELS = ("qwen", "gpt-oss")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """model and engine -> what each rank said."""
    tmp = tmp_path_factory.mktemp("experts")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "vocab_size": 258, "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=24)).save_pretrained(tmp / "qwen")
    gpt = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=4, intermediate_size=24, pad_token_id=1))
    for layer in gpt.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    gpt.save_pretrained(tmp / "gpt-oss")  # [experts, in, out], with biases and attention sinks
    for ranks in (1, 2):
        engines = ["single"] if ranks == 1 else ["zero2", "zero3", "fsdp2"]
        fields = [*EXPERTS, f"output_dir={tmp / 'run'}"]
        cases = {
            f"{model} {engine}": [*ENGINES[engine], *fields, f"model={tmp / model}"]
            for model in MODELS
            for engine in engines
        }
        run_ranks(ranks, "sharding/ranks_sharding.py", {"out": str(tmp / "out"), "cases": cases}, tmp)
    return {
        engine.name: [json.loads(path.read_text()) for path in sorted(engine.glob("*/*.json"))]
        for engine in (tmp / "out").iterdir()
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_two_ranks_are_one_process(found, engine: str, model: str) -> None:
    (alone,) = found[f"{model} single"]
    assert alone["losses"][-1] < alone["losses"][0]
    assert all(alone["in place"].values()), alone["in place"]
    assert len(found[f"{model} {engine}"]) == 2
    for said in found[f"{model} {engine}"]:
        assert said["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert said["fingerprint"] == alone["fingerprint"]
        assert all(said["in place"].values()), said["in place"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_rank_stores_half_of_the_experts(found, engine: str, model: str) -> None:
    (alone,) = found[f"{model} single"]
    for said in found[f"{model} {engine}"]:
        for kind in ("idx", "delta"):
            assert said["stored"][kind] == alone["stored"][kind] // 2
