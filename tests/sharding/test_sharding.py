"""Each rank holds only its slice, whatever the engine; the selection and the curve are those of one process."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import ENGINES, run_ranks
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig
from neuroada.config.ds_config import DS_CONFIGS
from neuroada.sharding.count import kept_bytes
from neuroada.sources.tiny import make_tiny

K = 4
ROWS = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # neurons of the tiny model's seven projections, both layers
CASES = {
    **ENGINES,
    "zero3 defaults": ["engine.name=deepspeed", "engine.ds_config={tmp}/zero3_defaults.json"],
    "zero3 nothing kept": ["engine.name=deepspeed", "engine.ds_config={tmp}/zero3_nothing_kept.json"],
    "zero3 hpz": ["engine.name=deepspeed", "engine.ds_config={tmp}/zero3_hpz.json"],
    "zero3 offload": ["engine.name=deepspeed", "engine.ds_config=zero3_offload"],
    "zero3 checkpointed": [*ENGINES["zero3"], "train.activation_checkpointing=true"],
    "fsdp2 checkpointed": [*ENGINES["fsdp2"], "train.activation_checkpointing=true"],
    "fsdp2 hybrid": [*ENGINES["fsdp2"], "engine.shard_size=2"],
    "fsdp2 replicated": [*ENGINES["fsdp2"], "engine.shard_size=1"],
    "fsdp2 offloaded": [*ENGINES["fsdp2"], "engine.shard_size=2", "engine.cpu_offload=true"],
    "single attention": [*ENGINES["single"], "adapter.target_modules=[q_proj, v_proj]"],
    "zero3 attention": [*ENGINES["zero3"], "adapter.target_modules=[q_proj, v_proj]"],
    "fsdp2 attention": [*ENGINES["fsdp2"], "adapter.target_modules=[q_proj, v_proj]"],
    "single bf16": [*ENGINES["single"], "train.dtype=bf16"],
    "zero2 bf16": [*ENGINES["zero2"], "train.dtype=bf16"],
    "zero3 bf16": [*ENGINES["zero3"], "train.dtype=bf16"],
    "fsdp2 bf16": [*ENGINES["fsdp2"], "train.dtype=bf16"],
    "zero3 bf16 nothing kept": [
        "engine.name=deepspeed",
        "engine.ds_config={tmp}/zero3_nothing_kept.json",
        "train.dtype=bf16",
    ],
}
NODES = ("zero3 hpz", "fsdp2 hybrid", "fsdp2 replicated", "fsdp2 offloaded")  # two nodes of two
ZERO3 = {"stage": 3, "reduce_bucket_size": 10_000_000}
NOTHING_KEPT = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list[dict]]]:
    """case -> world size -> what each rank said."""
    tmp = tmp_path_factory.mktemp("sharding")
    tiny = make_tiny(tmp / "tiny")
    (tmp / "zero3_defaults.json").write_text(json.dumps({"zero_optimization": ZERO3}))
    (tmp / "zero3_nothing_kept.json").write_text(json.dumps({"zero_optimization": ZERO3 | NOTHING_KEPT}))
    hpz = json.loads((DS_CONFIGS / "zero3_hpz.json").read_text())
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2  # ours is for nodes of eight
    (tmp / "zero3_hpz.json").write_text(json.dumps(hpz))
    for ranks in (1, 2, 3, 4):
        cases = {
            case: [field.format(tmp=tmp) for field in fields] + [f"model={tiny}", f"output_dir={tmp / 'run'}"]
            for case, fields in CASES.items()
            if ("single" in case) == (ranks == 1) or (ranks == 1 and case in ("zero3", "fsdp2"))
            if ranks == 4 or case not in NODES
        }
        run_ranks(ranks, "sharding/ranks_sharding.py", {"out": str(tmp / "out"), "cases": cases}, tmp)
    said: dict[str, dict[int, list[dict]]] = {}
    for path in sorted((tmp / "out").glob("*/*/*.json"), key=lambda path: int(path.stem)):
        said.setdefault(path.parts[-3], {}).setdefault(int(path.parts[-2]), []).append(json.loads(path.read_text()))
    return said


def compare_curves(found: dict, cases: list[str], expected: str, relative: float) -> None:
    curve = found[expected][1][0]["losses"]
    assert curve[-1] < curve[0]
    for case in cases:
        for ranks, said in found[case].items():
            for one in said:
                assert one["losses"] == pytest.approx(curve, rel=relative), (case, ranks)


def test_fp32_curves_are_those_of_one_process(found) -> None:
    """With prefetching and persistence at their defaults and off, offloaded, and with activation checkpointing."""
    every = [case for case in CASES if "bf16" not in case and "attention" not in case]
    compare_curves(found, every, "single", 1e-5)
    compare_curves(found, ["zero3 attention", "fsdp2 attention"], "single attention", 1e-5)


def test_bf16_curves_are_close(found) -> None:
    """Only the order of sums differs between engines: deltas, gradients and moments are fp32 in all of them. A sum of
    bf16 products that falls on the other side of a rounding moves a value by 2^-8 of itself, and the loss, a mean over
    372 tokens, by far less."""
    compare_curves(found, [case for case in CASES if "bf16" in case], "single bf16", 2e-3)


@pytest.mark.parametrize("case", ["zero2 bf16", "zero3 bf16", "fsdp2 bf16"])
def test_bf16_keeps_weights_in_bf16_and_deltas_in_fp32(found, case: str) -> None:
    whole = found[case.replace(" bf16", "")]
    for ranks, said in found[case].items():
        for one, fp32 in zip(said, whole[ranks], strict=True):
            assert 2 * one["stored"]["weights"] == fp32["stored"]["weights"]
            for kind in ("idx", "delta"):
                assert one["stored"][kind] == fp32["stored"][kind]


def test_selection_under_sharding_gives_the_same_bits(found) -> None:
    """2 and 4 ranks select on their own rows; for 3 no weight divides, and it is gathered."""
    for case, worlds in found.items():
        expected = "single attention" if "attention" in case else "single bf16" if "bf16" in case else "single"
        for said in worlds.values():
            for one in said:
                assert one["fingerprint"] == found[expected][1][0]["fingerprint"], case


def test_merging_in_place_and_back_to_the_bit(found) -> None:
    """Each rank writes its own rows, or gathers one weight at a time where no rank has whole rows."""
    for case, worlds in found.items():
        for ranks, said in worlds.items():
            for one in said:
                assert all(one["in place"].values()), (case, ranks, one["in place"])


@pytest.fixture(scope="module")
def tuned_on_meta(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(make_tiny(tmp_path_factory.mktemp("meta") / "tiny"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return get_peft_model(model, NeuroAdaConfig(k=K))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_every_rank_stores_its_slice_alone(found, tuned_on_meta, engine: str, ranks: int) -> None:
    whole = found["single"][1][0]["stored"]
    assert whole["idx"] == ROWS * K * 2
    assert whole["delta"] == ROWS * K * 4
    said = found[engine][ranks]
    assert len(said) == ranks
    rule = kept_bytes(tuned_on_meta, ranks, engine)
    for kind in ("weights", "idx", "delta"):
        held = [one["stored"][kind] for one in said]
        assert max(held) == rule[kind]
        assert whole[kind] <= sum(held) <= ranks * rule[kind]
        assert rule[kind] <= whole[kind] / ranks * 1.06 + 64  # rounding up is all that is added
        if engine == "zero3":
            assert [one["before"][kind] for one in said] == held  # sliced as it is built, not when training starts
    assert max(one["moments"] for one in said) == rule["moments"]
    if engine == "zero3":
        assert max(one["master"] for one in said) == rule["master"]


def test_hybrid_sharding_stores_a_copy_in_every_group(found, tuned_on_meta) -> None:
    """Four ranks as 2 x 2 store what two ranks do, twice; as 4 x 1, everything on each."""
    for case, shards in (("fsdp2 hybrid", 2), ("fsdp2 replicated", 1)):
        said = found[case][4]
        rule = kept_bytes(tuned_on_meta, shards, "fsdp2")
        assert len(said) == 4
        for one, alike in zip(said, found["fsdp2"][shards] * (4 // shards), strict=True):
            assert one["stored"] == alike["stored"]
            assert one["moments"] == alike["moments"]
        for kind in ("weights", "idx", "delta"):
            assert max(one["stored"][kind] for one in said) == rule[kind]


def test_hybrid_sharding_sends_gradients_alone_between_groups(found) -> None:
    """A micro batch gathers its blocks from its own group, as two ranks do, and reduce-scatters the deltas' gradients
    there; then a rank sums its rows of them, fp32, with the other group's."""
    batches, loss = 12 // 4, 4
    for one in found["fsdp2 hybrid"][4]:
        delta = one["stored"]["delta"]
        assert one["traffic"]["reduce float32"] == batches * (2 * delta + delta) + loss
        assert one["traffic"]["gather uint8"] * 2 == found["fsdp2"][2][0]["traffic"]["gather uint8"]  # of 6 batches
    assert [one["traffic"] for one in found["fsdp2 offloaded"][4]] == [
        one["traffic"] for one in found["fsdp2 hybrid"][4]
    ]
    for one in found["fsdp2 replicated"][4]:
        assert one["traffic"] == {"reduce float32": batches * one["stored"]["delta"] + loss}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_zero1_and_2_slice_master_and_moments(found, engine: str, ranks: int) -> None:
    delta = ROWS * K * 4
    for one in found[engine][ranks]:
        assert one["stored"]["delta"] == delta
        assert one["master"] <= delta / ranks + 64
        assert one["moments"] <= 2 * delta / ranks + 128


@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_follows_the_formula(found, ranks: int) -> None:
    """ZeRO-3 that keeps nothing gathers each layer's weight, idx and delta once a forward and once a backward of each
    micro batch, and reduces the deltas' gradients: over weights of bf16, uint8 is idx alone and fp32 delta alone."""
    micro = 12 // ranks
    for one in found["zero3 bf16 nothing kept"][ranks]:
        traffic = one["traffic"]
        assert traffic["gather uint8"] == 2 * micro * ROWS * K * 2
        assert traffic["gather float32"] == 2 * micro * ROWS * K * 4
        reduced = sum(size for name, size in traffic.items() if name.startswith("reduce"))
        assert reduced >= micro * ROWS * K * 4
        assert reduced <= 1.1 * micro * ROWS * K * 4


def test_the_readme_s_count_for_llama_13b() -> None:
    config = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), NeuroAdaConfig(k=20))
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    for ranks, label in ((1, "in all"), (8, "on a rank")):
        kept = kept_bytes(model, ranks, "zero3")
        numbers = [f"{kept[kind] / 1e6:,.1f}" for kind in ("weights", "idx", "delta", "master", "moments")]
        assert f"  | {label} | {' | '.join(numbers)} |" in lines
