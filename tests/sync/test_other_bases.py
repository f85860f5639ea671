"""What a receiver could not check, or could not place, is refused when the sender is made."""

import pytest
from peft import get_peft_model
from sync_models import TARGETS
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from neuroada import NeuroAdaConfig
from neuroada.errors import UserError
from neuroada.quantised import Quantisation, quantise
from neuroada.sync import Sender

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def conv1d() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))


def mixture() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, vocab_size=64))


def nf4() -> nn.Module:
    """With exact entries under the connections, as the original has them."""
    return quantise(
        LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128, vocab_size=64)), Quantisation("nf4", 3)
    )


@pytest.mark.parametrize(
    ("make", "targets", "said"),
    [
        (
            conv1d,
            {"target_modules": ["c_attn"]},
            r"c_attn is not a Linear's weight \[out, in\], which sync sends",
        ),
        (mixture, {"target_parameters": ["experts.down_proj"]}, r"experts.down_proj is not a Linear's weight"),
        (
            nf4,
            {"target_modules": TARGETS},
            r"its base is quantised \(nf4, 3 exact entries a row\), which",
        ),
    ],
)
def test_refused(make, targets: dict[str, list[str]], said: str) -> None:
    tuned = get_peft_model(make(), NeuroAdaConfig(k=3, **targets))
    with pytest.raises(UserError, match=said):
        Sender(tuned)
