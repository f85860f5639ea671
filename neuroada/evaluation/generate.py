"""Greedy generation for many prompts at once: continuous batching over an ordinary Hugging Face causal LM.

Rows are left-padded. A row that stops leaves the cache at once and a waiting prompt takes its place, so that the one
answer that runs to 512 tokens does not hold the others. `plan_batches` forms the batches from lengths alone, never from
the number of ranks: which prompts are decoded together, hence every floating-point sum, is the same on any of them.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from neuroada.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TURNS = 2  # prompts of a batch per row of its cache: more refills waste less, fewer leave more batches to share out
PREFILL_TOKENS = 1024  # of prompts that enter the cache in one forward: neighbours in length, so little is padding

OPTION_TOKENS = 4096  # of prompts with options in one forward: a processor gains no more by larger ones


@dataclass(frozen=True)
class Batch:
    """Prompts decoded together: their positions in the list that was planned, and how many may be in the cache.

    Of multiple choice: questions scored together, and how many of their options in one forward.
    """

    indices: tuple[int, ...]
    rows: int


def plan_batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[Batch]:
    """Cut prompts of `lengths` tokens into batches, longest first, so that no cache exceeds `batch_tokens` tokens.

    A prompt that alone exceeds `batch_tokens` still gets a batch of one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = []
    while order:
        rows = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        batches.append(Batch(tuple(order[: TURNS * rows]), rows))
        order = order[TURNS * rows :]
    return batches


def plan_options(lengths: Sequence[Sequence[int]], batch_tokens: int) -> list[Batch]:
    """Cut questions into batches, longest first.

    `lengths`: of each question, the tokens of the prompt with each option. A batch's `rows` sequences are at most
    `batch_tokens` tokens, and at most OPTION_TOKENS; all options of a question are in one batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-max(lengths[i]), i))
    batches: list[Batch] = []
    while order:
        rows = max(1, min(batch_tokens, OPTION_TOKENS) // max(lengths[order[0]]))
        count, sequences = 0, 0
        while count < len(order) and (count == 0 or sequences + len(lengths[order[count]]) <= rows):
            sequences += len(lengths[order[count]])
            count += 1
        batches.append(Batch(tuple(order[:count]), rows))
        order = order[count:]
    return batches


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids that end a generation: the tokenizer's EOS and those of the model's generation config. UserError."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(isinstance(i, int) for i in ids):
        raise UserError(
            f"generation_config.json of the model: eos_token_id is {configured!r:.60}, not a token's number or a list "
            f"of them; fetch the model again"
        )
    return {*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}


@torch.no_grad()  # not inference_mode: a model that trains on may keep tensors made here
def generate(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    rows: int,
    on_finished: Callable[[], Any] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt (token ids) greedily; the results are in the order of `prompts`, without the stop token.

    At most `rows` prompts are in the cache. `on_finished` is called once for each prompt that is done.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))
    live: list[int] = []  # live[r]: the prompt in row r of the cache
    cache: _Rows | None = None
    while waiting or live:
        # A prefill interrupts everybody: wait until a quarter of the rows is free, then fill them together.
        if len(live) <= rows - max(1, rows // 4):
            while waiting and len(live) < rows:
                group = min(rows - len(live), len(waiting), max(1, PREFILL_TOKENS // len(prompts[waiting[0]])))
                joining = [waiting.popleft() for _ in range(group)]
                fresh = _Rows.prefill(model, [prompts[i] for i in joining])
                cache = cache.join(fresh) if cache else fresh
                live += joining

        assert cache is not None
        keep = []
        for row, token in enumerate(cache.step(model).tolist()):
            output = outputs[live[row]]
            if token not in stop_ids:
                output.append(token)
            if token in stop_ids or len(output) == max_new_tokens:
                on_finished()
            else:
                keep.append(row)
        if len(keep) < len(live):
            live = [live[row] for row in keep]
            cache = cache.select(keep) if keep else None
    return outputs


@torch.no_grad()
def log_likelihoods(
    model: "PreTrainedModel",
    sequences: Sequence[tuple[Sequence[int], int]],
    rows: int,
    on_finished: Callable[[], Any] = lambda: None,
) -> list[float]:
    """For each (token ids, start): the summed log-probability, in fp32, of the tokens from `start` on.

    1 <= start < the number of tokens. `rows` sequences go through the model at once, padded on the left, so that what
    is scored stands at the end and logits exist only there. `on_finished` is called once for each sequence.
    """
    found: list[float] = []
    for begin in range(0, len(sequences), rows):
        group = sequences[begin : begin + rows]
        length, scored = max(len(ids) for ids, _ in group), max(len(ids) - start for ids, start in group)
        ids = torch.tensor([[0] * (length - len(one)) + list(one) for one, _ in group], device=model.device)
        mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one, _ in group], device=model.device)
        counts = torch.tensor([len(one) - start for one, start in group], device=model.device)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=scored + 1,
        ).logits[:, :-1]
        log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, -scored:, None]).squeeze(-1)
        before = torch.arange(scored, device=model.device) < scored - counts[:, None]  # prompt, or padding
        found += log_probs.masked_fill(before, 0.0).sum(1).tolist()
        for _ in group:
            on_finished()
    return found


@dataclass
class _Rows:
    """The sequences being decoded. Each is left-padded to the cache's length; its last token is not in the cache yet.

    `cache` is a full-length cache even for models with sliding windows (their masks see to the window): a layer that
    drops old entries could not be joined to a longer one.
    """

    cache: DynamicCache  # keys and values of each layer: [rows, heads, length, head_dim]
    mask: Tensor  # int64 [rows, length], 1 where the cache holds a token, 0 on padding
    last: Tensor  # int64 [rows], the token that goes in next

    @classmethod
    def prefill(cls, model: "PreTrainedModel", prompts: Sequence[Sequence[int]]) -> "_Rows":
        """Run all but the last token of each prompt."""
        length = max(2, *map(len, prompts)) - 1
        ids = torch.tensor([[0] * (length - len(p) + 1) + list(p[:-1]) for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (length - len(p) + 1) + [1] * (len(p) - 1) for p in prompts], device=model.device)
        last = torch.tensor([p[-1] for p in prompts], device=model.device)
        rows = cls(DynamicCache(), mask, last)
        rows._forward(model, ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        return rows

    def step(self, model: "PreTrainedModel") -> Tensor:
        """Run the last token of each row: the most likely next ones, int64 [rows]."""
        position_ids = self.mask.sum(1, keepdim=True)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.last = self._forward(model, self.last[:, None], position_ids).argmax(-1)
        return self.last

    def _forward(self, model: "PreTrainedModel", ids: Tensor, position_ids: Tensor) -> Tensor:
        return model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _dynamic(self) -> list[Any]:
        return self.cache.layers  # DynamicLayers all, made by DynamicCache() as they are needed

    def join(self, other: "_Rows") -> "_Rows":
        """These rows, then `other`'s, the shorter cache padded on the left. `self` is used up."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def stack(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([F.pad(t, (0, 0, length - t.shape[-2], 0)) for t in (mine, theirs)])

        for mine, theirs in zip(self._dynamic(), other._dynamic(), strict=True):
            mine.keys, mine.values = stack(mine.keys, theirs.keys), stack(mine.values, theirs.values)
        mask = stack(self.mask[..., None], other.mask[..., None])[..., 0]
        return _Rows(self.cache, mask, torch.cat([self.last, other.last]))

    def select(self, keep: list[int]) -> "_Rows":
        """The rows `keep`, without the padding that all of them share. `self` is used up."""
        rows = torch.tensor(keep, device=self.mask.device)
        mask = self.mask[rows]
        start = int(mask.any(0).to(torch.int8).argmax())
        for layer in self._dynamic():
            layer.keys, layer.values = layer.keys[rows, :, start:], layer.values[rows, :, start:]
        return _Rows(self.cache, mask[:, start:], self.last[rows])
