"""Attention over packed rows: sequences that lie end to end must not see each other.

Position ids that start again at 0 say where a sequence begins. On a GPU, flash-attn's variable-length kernels take them
as they are. Elsewhere `packed_sdpa` does the same with torch's own attention: the row is split at the sequences' starts
and each piece attends causally to itself, so that no [tokens, tokens] mask is built and no masked product is computed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from neuroada.hf import attention_sinks
from neuroada.hf.packed import split_sequences


def choose_attention(packing: bool, dtype: str, device: torch.device, sinks: bool = False) -> str:
    """The attention implementation, by transformers' names, of a training in `dtype` (bf16 or fp32) on this device.

    sinks: of a model with attention sinks.
    """
    if sinks:
        return attention_sinks.NAME
    if not packing:
        return "sdpa"
    if device.type == "cuda" and dtype == "bf16" and is_flash_attn_2_available():
        return "flash_attention_2"
    return "packed_sdpa"


def describe_attention(packing: bool, dtype: str, device: torch.device, sinks: bool = False) -> str:
    """The choice in words; on a GPU with the reason why it is not flash-attn."""
    chosen = choose_attention(packing, dtype, device, sinks)
    if sinks:
        return f"{chosen}, torch's attention sequence by sequence, with the model's attention sinks"
    if chosen != "packed_sdpa" or device.type != "cuda":
        return chosen
    reason = "flash-attn takes no fp32" if dtype != "bf16" else "no flash-attn: see requirements-gpu.txt"
    return f"packed_sdpa, torch's attention sequence by sequence ({reason})"


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, d], key and value [1, key heads, tokens, d], position_ids [1, tokens] int64 ->
    ([1, tokens, heads, d], None), as transformers' attention functions do.

    Anything but one row of whole sequences (padded batches, generation) is plain sdpa's.
    """
    one_row = len(query) == 1 and query.shape[2] == key.shape[2]
    if attention_mask is not None or position_ids is None or not one_row:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    pieces = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in split_sequences(position_ids, query, key, value)
    ]
    return torch.cat(pieces, 2).transpose(1, 2), None


def packed_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """None for what `packed_sdpa` cuts itself; else sdpa's mask, a sliding window shorter than the row included."""
    window = kwargs.get("local_size") or kv_length
    if batch_size == 1 and attention_mask is None and q_length == kv_length <= window:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register("packed_sdpa", packed_sdpa)
AttentionMaskInterface.register("packed_sdpa", packed_mask)
