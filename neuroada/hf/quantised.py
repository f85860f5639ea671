"""A quantised base model, from an ordinary checkpoint or from one that `neuroada quantise` wrote.

transformers loads such a model whole in every rank (it skips zero.Init for quantised models): here it is built without
values, sharded parameter by parameter, and filled by rows, so that no rank ever holds a dense layer.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.hf.loading import build_empty
from neuroada.hf.quantised_config import stored_quantisation
from neuroada.hf.tensor_files import Checkpoint, resolve
from neuroada.hf.weights import fill, wanted
from neuroada.quantised import PackedRows, Quantisation, QuantisedLinear, quantise


def choose_quantisation(recipe: Recipe, config: Any) -> Quantisation | None:
    """What the recipe asks for, or else what its model's files are. UserError where they differ.

    config: the model's, of transformers.
    """
    source, format = recipe.model, recipe.base.model_dtype
    asked = None if format is None else Quantisation(format, recipe.exact)
    stored = stored_quantisation(config, source)
    if asked and stored and asked != stored:
        raise UserError(
            f"base.model_dtype = {asked.describe()}: {source} is already quantised ({stored.describe()}); give the "
            f"original checkpoint, or leave base out"
        )
    return stored or asked  # the files know whether an adapter was merged into them


def quantised_layers(source: str, quantisation: Quantisation) -> dict[str, PackedRows]:
    """The layers of the causal LM in a folder that are quantised, by module name, without a weight."""
    from transformers import AutoModelForCausalLM

    model = quantise(build_empty(AutoModelForCausalLM, source, torch.bfloat16, "sdpa"), quantisation)
    return {name: module.rows for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def pretrained_quantised(auto: Any, source: str, dtype: torch.dtype, quantisation: Quantisation, device: Any) -> Any:
    """The base model by the transformers class `auto`, quantised, on one device."""
    empty = declared_quantised(build_empty(auto, source, dtype, "sdpa"), quantisation)
    return load_quantised(empty, source, device)


def declared_quantised(empty: Any, quantisation: Quantisation) -> Any:
    """A transformers model on the meta device, quantised in place, which its save_pretrained refuses from now on."""
    from neuroada.hf.quantizer import declare_quantised

    declare_quantised(quantise(empty, quantisation), quantisation)
    return empty


def without_zero_init() -> AbstractContextManager[None]:
    """In the block, a model is built without DeepSpeed's zero.Init, also under ZeRO-3: so transformers builds those
    that it quantises."""
    from transformers.modeling_utils import set_quantized_state

    return set_quantized_state()


def load_quantised(empty: Any, source: str, device: torch.device) -> nn.Module:
    """Give `empty`, a quantised model on the meta device, its memory and its values.

    Under DeepSpeed ZeRO-3 (as transformers' from_pretrained would know it) every parameter is partitioned as soon as it
    has memory, and each rank reads and quantises the rows it stores; otherwise it is whole, on `device`.
    """
    files = Checkpoint(resolve(source, "model ="), "model = ").file_of
    partition = _Zero3() if _under_zero3() else None
    for module in empty.modules():
        if any(param.is_meta for param in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            if partition is not None:
                partition(module)
    empty.to(device)  # buffers
    empty.tie_weights()
    with torch.no_grad():
        fill(wanted(empty, empty.base_model_prefix, files), files)
    return empty.eval()


class _Zero3:
    """Partitions a module's own parameters, by the settings of DeepSpeed's JSON."""

    def __init__(self) -> None:
        self.first: Any = None

    def __call__(self, module: nn.Module) -> None:
        params = list(module.parameters(recurse=False))
        if self.first is None:
            import deepspeed
            from transformers.integrations.deepspeed import deepspeed_config

            holder = nn.ParameterList(params)
            deepspeed.zero.Init(module=holder, config_dict_or_path=deepspeed_config())
            self.first = params[0]
        else:
            self.first.convert_to_zero_parameters(params)


def _under_zero3() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())
