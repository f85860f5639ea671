"""NeuroAda as a PEFT citizen: what PEFT promises of every method holds, to the bit."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import ATTENTION, X, assert_base_is_whole, logits, make_base, train_a_little, weights
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig, select_by_gradient
from neuroada.adapter.adapter_file import read_adapter
from neuroada.adapter.saved import save_adapter
from neuroada.errors import UserError


@pytest.fixture
def base() -> LlamaForCausalLM:
    return make_base()


@pytest.fixture
def tuned(base: LlamaForCausalLM) -> PeftModel:
    return train_a_little(
        get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=5, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    ).eval()


def test_a_new_adapter_changes_nothing(base) -> None:
    fresh = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=5, target_modules=ATTENTION))
    assert logits(fresh).equal(logits(base))
    assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) == 2 * 3 * 64 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_logits_are_the_adapter_s_exactly(dtype) -> None:
    base = make_base().to(dtype)
    tuned = train_a_little(get_peft_model(base, NeuroAdaConfig(k=5, target_modules=ATTENTION))).eval()
    before = logits(tuned)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, LlamaForCausalLM)
    assert logits(merged).equal(before)
    assert not any("neuroada" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deltas_follow_the_weights_dtype_where_asked(base, tmp_path, dtype: torch.dtype) -> None:
    """PEFT's autocast_adapter_dtype = False. Files hold fp32 all the same, and so does what loads them."""
    plain = copy.deepcopy(base).to(dtype)
    config = NeuroAdaConfig(k=5, target_modules=ATTENTION)
    tuned = get_peft_model(copy.deepcopy(plain), config, autocast_adapter_dtype=False)
    assert dtypes(tuned) == {dtype}
    tuned(input_ids=X).logits.float().square().mean().backward()
    for name, param in tuned.named_parameters():
        if "neuroada_delta" in name:
            assert param.grad is not None and param.grad.dtype == dtype and param.grad.any()
            param.data.normal_(std=0.05)  # AdamW's eps is 0 in fp16
    expected = logits(tuned)
    assert not expected.equal(logits(plain))
    tuned.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)  # as `neuroada evaluate` and `merge` do
    assert {delta.dtype for _, delta in saved.connections.values()} == {torch.float32}
    for follows, kept in ((False, dtype), (True, torch.float32)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path), autocast_adapter_dtype=follows)
        assert dtypes(loaded) == {kept} and logits(loaded).equal(expected)
    assert logits(tuned.merge_and_unload()).equal(expected)


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {param.dtype for name, param in model.named_parameters() if "neuroada_delta" in name}


def test_disabling_gives_the_base_back_and_enabling_the_adapter(base, tuned) -> None:
    adapted = logits(tuned)
    assert not adapted.equal(logits(base))
    with tuned.disable_adapter():
        assert_base_is_whole(tuned, base)
        assert logits(tuned).equal(logits(base))
    assert logits(tuned).equal(adapted)


def test_merge_and_unmerge_restore_the_bits(base, tuned) -> None:
    adapted = logits(tuned)
    tuned.merge_adapter()
    assert logits(tuned).equal(adapted)
    assert not weights(tuned)["model.layers.0.self_attn.q_proj.weight"].equal(
        base.model.layers[0].self_attn.q_proj.weight
    )
    with tuned.disable_adapter():
        assert logits(tuned).equal(logits(base))
    tuned.unmerge_adapter()
    assert logits(tuned).equal(adapted)
    tuned.merge_adapter()
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        assert_base_is_whole(tuned, base)


def test_unload_gives_the_base_back(base, tuned) -> None:
    assert_base_is_whole(tuned.unload(), base)


def test_save_and_load(base, tuned, tmp_path: Path) -> None:
    adapted = logits(tuned)
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    out_features = 2 * 3 * 64
    assert file.stat().st_size <= 5 * out_features * 6 + 64 * 1024
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert logits(loaded).equal(adapted)
        assert not any(p.requires_grad for p in loaded.parameters())
    going_on = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert train_a_little(going_on)(input_ids=X, labels=X).loss < tuned(input_ids=X, labels=X).loss


def test_our_own_writer_writes_what_peft_writes(tuned, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path / "peft")
    save_adapter(tuned, tmp_path / "ours")
    files = ("adapter_model.safetensors", "adapter_config.json")
    for file in files:
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_two_adapters_and_switching(base, tuned) -> None:
    first = logits(tuned)
    tuned.add_adapter("other", NeuroAdaConfig(k=3, selection="random", target_modules=["q_proj", "o_proj"]))
    tuned.set_adapter("other")
    assert logits(tuned).equal(logits(base))
    second = logits(train_a_little(tuned.train()).eval())
    tuned.set_adapter("default")
    assert logits(tuned).equal(first)
    tuned.set_adapter("other")
    assert logits(tuned).equal(second)
    assert not second.equal(first)
    tuned.set_adapter("default")
    tuned.delete_adapter("other")
    assert logits(tuned).equal(first)
    with tuned.disable_adapter():
        assert_base_is_whole(tuned, base)


def test_gradient_selection(base, tmp_path: Path) -> None:
    config = NeuroAdaConfig(k=4, selection="gradient", target_modules=ATTENTION)
    tuned = get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(UserError, match="select_by_gradient"):
        logits(tuned)
    with pytest.raises(UserError, match="nothing to save"):
        tuned.save_pretrained(tmp_path)
    select_by_gradient(tuned.base_model, "default", lambda: tuned(input_ids=X, labels=X).loss.backward())
    base.requires_grad_(True)
    base(input_ids=X, labels=X).loss.backward()
    for layer in tuned.base_model.adapted_layers("default"):
        dense = base.get_submodule(layer.name).weight.grad.abs()
        chosen = dense.gather(1, layer_indices(layer))
        assert chosen.sum(1).numpy() == pytest.approx(dense.topk(4, dim=1).values.sum(1).numpy(), rel=1e-4)
    train_a_little(tuned)


def layer_indices(layer) -> torch.Tensor:
    from neuroada.ops import unpack_indices

    return unpack_indices(layer.neuroada_idx["default"])


def test_an_adapter_of_other_weights_is_refused(base, tuned, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path)
    torch.manual_seed(7)
    other = make_base()
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.add_(0.5)
    with pytest.raises(UserError, match="trained on other base weights"):
        PeftModel.from_pretrained(other, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_fingerprint": None}))
    PeftModel.from_pretrained(other, tmp_path)  # on purpose
    # bf16 and fp32 loads of one base are the same base
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"k": 0}, "k = 0: must be a whole number of at least 1"),
        ({"selection": "biggest"}, "selection = 'biggest': must be one of"),
        ({"k": 65}, "k = 65: model.layers.0.self_attn.q_proj has only 64 inputs"),
        ({"target_modules": ["q_proj", "qproj"]}, "'qproj' matches no module.*q_proj"),
        ({"target_modules": "nothing.*here"}, "matches no module"),
        ({"target_modules": ["input_layernorm"]}, "is a LlamaRMSNorm, not a Linear"),
        ({"k_pattern": {"v_proj": 0}}, r"k_pattern\['v_proj'\] = 0: must be"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "layers_to_transform = .0.: cannot join"),
        ({"layers_pattern": "layers"}, "layers_pattern = 'layers': needs layers_to_transform"),
    ],
)
def test_mistakes_are_told_before_anything_is_replaced(config: dict, said: str) -> None:
    base = make_base(tie_word_embeddings=True)
    with pytest.raises(UserError, match=said):
        get_peft_model(base, NeuroAdaConfig(**{"k": 2, "target_modules": ["q_proj"], **config}))


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores [in, out]: its neurons are columns."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    config = NeuroAdaConfig(k=3, target_modules=["c_attn", "c_proj", "c_fc"])
    tuned = get_peft_model(copy.deepcopy(base), config)
    assert logits(tuned).equal(logits(base))
    layer = tuned.base_model.adapted_layers("default")[0]
    strongest = base.transformer.h[0].attn.c_attn.weight.t().abs().topk(3, 1).indices.sort(1).values
    assert layer_indices(layer).equal(strongest) and layer.out_features == 96
    adapted = logits(train_a_little(tuned).eval())
    assert not adapted.equal(logits(base))
    tuned.merge_adapter()
    assert logits(tuned).equal(adapted)
    tuned.unmerge_adapter()
    tuned.save_pretrained(tmp_path)
    assert logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)).equal(adapted)
    assert_base_is_whole(tuned.unload(), base)


def test_too_many_inputs_for_two_bytes() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(65537, 2, device="meta")

    with pytest.raises(UserError, match="65537 inputs"):
        get_peft_model(Wide(), NeuroAdaConfig(k=1, target_modules=["wide"]))


def test_damaged_weights_are_refused(base) -> None:
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"layers.0.self_attn.k_proj.weight holds values that are not finite"):
        get_peft_model(base, NeuroAdaConfig(k=1, target_modules=["k_proj"]))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@pytest.mark.parametrize(
    ("sizes", "per_k"),
    [  # k x the sum of out_features: LLaMA-7B, LLaMA-13B, Llama-3-8B
        ((4096, 11008, 32, 32, 32), 1_359_872),
        ((5120, 13824, 40, 40, 40), 2_129_920),
        ((4096, 14336, 32, 32, 8), 1_376_256),
    ],
)
@pytest.mark.parametrize("k", [1, 20])
def test_trainable_counts_at_scale(sizes: tuple, per_k: int, k: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **dict(zip(SIZES, sizes, strict=True))))
    tuned = get_peft_model(model, NeuroAdaConfig(k=k))  # the seven projections are a Llama's default
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == k * per_k


def test_peft_knows_the_method_whichever_is_imported_first(tmp_path: Path) -> None:
    import subprocess
    import sys

    check = "; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; assert 'NEUROADA' in m"
    for order in ("import neuroada, peft", "import peft, neuroada"):
        subprocess.run([sys.executable, "-c", order + check], check=True)
