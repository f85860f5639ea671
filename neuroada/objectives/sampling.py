"""A few greedy answers of a model that is being trained, under any engine.

Every rank computes the same tokens by whole forward passes, without a cache: what a sharded model gathers is gathered
by all, and the loop ends for all at once. Slow, and meant for a handful of samples; scores come from
neuroada.evaluation, with the merged model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from neuroada.data.encoding import Tokens
from neuroada.objectives.micro_batch import Labelled

NEW_TOKENS = 48


def prompts_of(sequences: Sequence[Labelled | Tokens]) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, expected answers): each sequence up to its first learnt token, and its first run of learnt tokens."""
    prompts, expected = [], []
    for one in sequences:
        start = max(int(np.argmax(one.learnt)), 1)
        after = np.flatnonzero(~one.learnt[start:])
        end = start + int(after[0]) if len(after) else len(one.ids)
        prompts.append(one.ids[:start].tolist())
        expected.append(one.ids[start : min(end, start + NEW_TOKENS)].tolist())
    return prompts, expected


def answer(
    model: Callable[..., Any], prompts: list[list[int]], tokenizer: Any, device: torch.device
) -> list[list[int]]:
    """Up to NEW_TOKENS greedy tokens after each prompt, until EOS or the model's end of turn."""
    stops = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    while running and len(answers[min(running)]) < NEW_TOKENS:
        chosen = sorted(running)
        rows = [torch.tensor(prompts[i] + answers[i]) for i in chosen]
        last = torch.tensor([len(row) - 1 for row in rows])
        pad = torch.nn.utils.rnn.pad_sequence
        keep, column = last.unique(return_inverse=True)
        logits = model(
            input_ids=pad(rows, True, 0).to(device),
            attention_mask=pad([torch.ones_like(row) for row in rows], True, 0).to(device),
            logits_to_keep=keep.to(device),
            use_cache=False,
        ).logits
        best = logits[torch.arange(len(rows)), column.to(device)].argmax(-1).tolist()
        for i, token in zip(chosen, best, strict=True):
            answers[i].append(token)
            if token in stops:
                running.discard(i)
    return answers
