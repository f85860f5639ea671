"""Packed attention for models with attention sinks (gpt-oss), which neither torch's function nor flash-attn 2 knows.

A sink is a learnt logit per head that takes part in every softmax and has no value: here it is one more key, of zeros.
The row is split at the sequences' starts for every layer, those with a sliding window too: gpt-oss makes its masks
without looking at position ids (transformers 5.23), so that a mask of the whole row would join neighbours.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from neuroada.hf.packed import split_sequences

WITH_SINKS = ("gpt_oss",)
NAME = "packed_sinks"  # transformers refuses these models every implementation with sdpa in its name


def has_sinks(config: Any) -> bool:
    """Whether the attention of this transformers configuration's model has sinks."""
    return getattr(config, "model_type", None) in WITH_SINKS


def packed_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [b, heads, tokens, d], key and value [b, key heads, kv, d], position_ids [b, tokens] int64, sinks s_aux
    [heads] -> ([b, tokens, heads, d], None), as transformers' attention functions do.

    attention_mask [b, 1, tokens, kv] bool says what is seen; without it a row holds whole sequences.
    """
    assert s_aux is not None
    sequences: Iterable[tuple[torch.Tensor, ...]] = [(query, key, value)]
    if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]:
        sequences = split_sequences(position_ids, query, key, value)
    pieces = []
    for q, k, v in sequences:
        seen = _causal(q, k, sliding_window) if attention_mask is None else attention_mask
        pieces.append(_attend(q, k, v, seen, s_aux, dropout_p=dropout, scale=scaling))
    return torch.cat(pieces, 2).transpose(1, 2), None


def _causal(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """[1, 1, q, kv] bool: what the last q of kv tokens see, themselves and at most window - 1 before."""
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, sinks: torch.Tensor, **how: Any
) -> torch.Tensor:
    """[b, heads, q, d]: attention with one more key, of logit `sinks` [heads] and value 0. seen [b, 1, q, kv] bool."""
    batch, heads, queries = query.shape[:3]
    bias = query.new_zeros(()).masked_fill(~seen[..., : key.shape[2]], -torch.inf).expand(batch, heads, -1, -1)
    sink = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, -1, queries, -1)
    key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    mask = torch.cat([bias, sink], dim=-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **how)


def packed_sinks_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """None for what `packed_sinks` cuts itself; else sdpa's mask."""
    if batch_size == 1 and attention_mask is None and q_length == kv_length:
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, packed_sinks)
AttentionMaskInterface.register(NAME, packed_sinks_mask)
