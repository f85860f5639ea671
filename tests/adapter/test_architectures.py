"""One tiny random model of each architecture: attached by default targets, trained, saved, loaded, merged, unmerged.

docs/models.md holds the table of these rows: `python tests/adapter/test_architectures.py` writes it.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from neuroada import NeuroAdaConfig
from neuroada.adapter.default_targets import TARGET_MODULES, TARGET_PARAMETERS
from neuroada.errors import UserError
from neuroada.ops import adapted, read_entries, unpack_indices, write_entries

DOCS = Path(__file__).parents[2] / "docs/models.md"
K = 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
          "labels": torch.tensor([0, 1])}  # fmt: skip
SPEECH = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)), "labels": IDS}


@dataclass
class Row:
    """An architecture: its classes are `<name>Config` and `<name><head>`."""

    name: str
    head: str = "ForCausalLM"
    config: str = "Config"
    sizes: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: TEXT)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.name + self.config)(**self.sizes)
        return getattr(transformers, self.name + self.head)(config).eval()


ROWS = [
    Row("Llama", sizes=SIZES),
    Row("Mistral", sizes=SIZES),
    Row("Qwen2", sizes=SIZES),
    Row("Qwen3", sizes=SIZES | {"head_dim": 8}),
    Row("Qwen3Moe", sizes=SIZES | MIXTURE | {"head_dim": 8, "num_experts": 4}),
    Row("Mixtral", sizes=SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("GptOss", sizes=SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("Qwen2Moe", sizes=SIZES | MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 24}),
    Row("Olmoe", sizes=SIZES | {"num_experts": 4, "num_experts_per_tok": 2}),
    Row("Glm4Moe", sizes=SIZES | MIXTURE | ROUTED | {"head_dim": 8}),
    Row("Gemma", sizes=SIZES | {"head_dim": 8}),
    Row("Gemma2", sizes=SIZES | {"head_dim": 8}),
    Row("Gemma3", config="TextConfig", sizes=SIZES | {"head_dim": 8}),
    Row("Phi3", sizes=SIZES),
    Row("GPT2", "LMHeadModel", sizes={"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    Row("GPTNeoX", sizes=SIZES),
    Row("Falcon", sizes=SIZES | {"bias": False}),
    Row("Bloom", sizes=SIZES),
    Row("Olmo", sizes=SIZES),
    Row("Olmo2", sizes=SIZES),
    Row("Olmo3", sizes=SIZES),
    Row("SmolLM3", sizes=SIZES),
    Row("Granite", sizes=SIZES),
    Row("Cohere", sizes=SIZES),
    Row("Cohere2", sizes=SIZES | {"head_dim": 8}),
    Row("StableLm", sizes=SIZES),
    Row("Glm4", sizes=SIZES | {"head_dim": 8}),
    Row("Starcoder2", sizes=SIZES),
    Row("Phi", sizes=SIZES),
    Row("OPT", sizes=SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Row("DeepseekV3", sizes=SIZES | MIXTURE | LATENT | ROUTED | {"num_key_value_heads": 4}),
    Row(
        "T5",
        "ForConditionalGeneration",
        sizes={
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    ),
    Row("Bert", "ForMaskedLM", sizes=SIZES),
    Row("Roberta", "ForMaskedLM", sizes=SIZES),
    Row("Electra", "ForMaskedLM", sizes=SIZES | {"embedding_size": 32}),
    Row("DebertaV2", "ForMaskedLM", sizes=SIZES),
    Row(
        "DistilBert", "ForMaskedLM", sizes={"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64}
    ),
    Row("ModernBert", "ForMaskedLM", sizes=SIZES | {"cls_token_id": 1, "sep_token_id": 2}),
    Row("ViT", "ForImageClassification", sizes=SIZES | {"image_size": 16, "patch_size": 8}, inputs=IMAGES),
    Row(
        "Whisper",
        "ForConditionalGeneration",
        sizes={
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 64,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        inputs=SPEECH,
    ),
]


VARIANTS = [Row("Falcon", sizes=SIZES | {"bias": True})]
"""Of architectures that have a row."""

ROUTER = Row("Phimoe", sizes=SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2})
REFUSED = [(ROUTER, "router", "own forward may do more than a product", "the router of `phimoe`, by name")]
"""A module that is not served, and the reason as it is told."""


def table() -> str:
    """The rows as docs/models.md shows them."""
    lines = ["| architecture | class | modules by default | parameters by default |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        kind = getattr(transformers, row.name + row.config).model_type
        modules = " ".join(f"`{target}`" for target in TARGET_MODULES[kind])
        parameters = " ".join(f"`{target}`" for target in TARGET_PARAMETERS.get(kind, []))
        lines.append(f"| `{kind}` | {row.name}{row.head} | {modules} | {parameters} |")
    refused = [f'- {what}: "... {said} ..."' for _, _, said, what in REFUSED]
    return "\n".join([*lines, "", "Refused, in one line:", "", *refused, ""])


@pytest.fixture(params=[*ROWS, *VARIANTS], ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> torch.Tensor:
    return model(**row.inputs).logits


def train(model: nn.Module, row: Row) -> nn.Module:
    """One step."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    model(**row.inputs).loss.backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    optimizer.step()
    return model


def expected_weights(tuned: PeftModel) -> dict[str, torch.Tensor]:
    """Each adapted weight as neurons [., in], with base + delta, rounded once, at its connections."""
    expected = {}
    for layer in tuned.base_model.adapted_layers("default"):
        idx, delta = (part["default"].detach().flatten(0, -2) for part in (layer.neuroada_idx, layer.neuroada_delta))
        with layer.base.own_rows() as (_, weight):
            expected[layer.name] = weight.clone()
        columns = unpack_indices(idx)
        values = adapted(read_entries(expected[layer.name], columns), delta)
        write_entries(expected[layer.name], columns, values)
    return expected


def test_by_default_targets(row: Row, tmp_path: Path) -> None:
    base = row.model()
    tuned = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=K)).eval()
    layers = tuned.base_model.adapted_layers("default")
    trainable = {name for name, param in tuned.named_parameters() if param.requires_grad}
    assert trainable == {name for name, _ in tuned.named_parameters() if ".neuroada_delta." in name}
    assert len(trainable) == len(layers)
    torch.testing.assert_close(logits(tuned, row), logits(base, row), rtol=1e-5, atol=1e-6)

    found = logits(train(tuned, row), row)
    assert not torch.allclose(found, logits(base, row), rtol=1e-4, atol=1e-5)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert logits(loaded, row).equal(found)

    expected = expected_weights(tuned)
    tuned.merge_adapter()
    for layer in layers:
        with layer.base.own_rows() as (_, weight):
            assert weight.equal(expected[layer.name]), layer.name
    torch.testing.assert_close(logits(tuned, row), found, rtol=1e-5, atol=1e-6)
    tuned.unmerge_adapter()
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, row), found, rtol=1e-5, atol=1e-6)

    plain = dict(base.named_parameters())
    unloaded = tuned.unload()
    assert {name for name, _ in unloaded.named_parameters()} == plain.keys()
    for name, param in unloaded.named_parameters():
        assert param.equal(plain[name]), name


@pytest.mark.parametrize(("row", "module", "said"), [refused[:3] for refused in REFUSED])
def test_what_is_not_served_is_refused(row: Row, module: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        get_peft_model(row.model(), NeuroAdaConfig(k=K, target_modules=[module]))
    assert "\n" not in str(told.value)


def test_docs_show_the_table() -> None:
    assert table() in DOCS.read_text(), "python tests/adapter/test_architectures.py writes it"


if __name__ == "__main__":
    BEGIN = "<!-- the table -->\n"
    DOCS.write_text(DOCS.read_text().partition(BEGIN)[0] + BEGIN + "\n" + table())
