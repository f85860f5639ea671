"""Models of the adapter's tests, and the shortest training that moves a delta."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from neuroada.ops import unpack_indices

X = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
ATTENTION = ["q_proj", "k_proj", "v_proj"]


def make_base(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 128, **sizes, **changes})).eval()


def train_a_little(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = X) -> torch.Tensor:
    return model(input_ids=ids).logits


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's weights by their own names, wherever an adapter hides them."""
    clean = lambda name: name.replace("base_model.model.", "").replace("base_layer.", "")  # noqa: E731
    return {clean(name): param.detach() for name, param in model.named_parameters() if "neuroada_" not in name}


def assert_base_is_whole(model: nn.Module, base: nn.Module) -> None:
    expected = dict(base.named_parameters())
    for name, weight in weights(model).items():
        assert weight.equal(expected[name]), name


def layer_indices(layer: nn.Module, adapter: str = "default") -> torch.Tensor:
    """The columns of a layer's connections."""
    return unpack_indices(layer.neuroada_idx[adapter])
