"""Small sharded checkpoints and adapters over them."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig

TARGETS = ["q_proj", "o_proj", "down_proj"]


def save_base(folder: Path, dtype: torch.dtype = torch.float32, *, shards: bool = True, tied: bool = False) -> Path:
    """A random 2-layer Llama in several files, its weights rounded so that magnitudes tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for param in model.parameters():
        param.data = ((param.data * 256).round() / 256).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


def adapted(base: Path, **options: object) -> PeftModel:
    """The base with an adapter whose deltas, and modules saved whole, are random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = NeuroAdaConfig(**{"k": 3, "target_modules": TARGETS, **options})
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if ".neuroada_delta." in name or ".modules_to_save." in name:
            param.data += 0.1 * torch.randn_like(param)
    return model


def save_adapter(base: Path, folder: Path, **options: object) -> Path:
    adapted(base, **options).save_pretrained(folder)
    return folder
