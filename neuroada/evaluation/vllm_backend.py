"""vLLM as an optional backend: one process of ours, as many GPUs as vLLM uses itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch

from neuroada.errors import UserError
from neuroada.evaluation.generate import Batch
from neuroada.evaluation.load import load
from neuroada.evaluation.questions import Scored
from neuroada.evaluation.source import Source
from neuroada.quantised import dequantise

NO_OPTIONS = "backend: vllm scores no multiple choice; give --backend hf"

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}


class VllmBackend:
    """Greedy decoding by vLLM. A context: an adapter is merged into a temporary folder, which is gone on leaving."""

    def __init__(self, source: Source, dtype: str) -> None:
        import vllm

        self._vllm = vllm
        self._merged: TemporaryDirectory | None = None
        folder = source.model
        if source.adapter is not None:
            self._merged = TemporaryDirectory(prefix="neuroada-merged-")
            folder = self._merged.name
            model, tokenizer = load(source, dtype, torch.device("cpu"))
            dequantise(model).save_pretrained(folder)  # of a quantised base, layers without an adapter still are
            tokenizer.save_pretrained(folder)
        self._source, self._dtype = source, dtype
        self._llm = vllm.LLM(model=folder, dtype=DTYPES[dtype])
        self.context: int | None = self._llm.llm_engine.model_config.max_model_len

    def __enter__(self) -> "VllmBackend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._merged is not None:
            self._merged.cleanup()

    def describe(self) -> list[Any]:
        return ["vllm", self._vllm.__version__, self._dtype, Path(self._source.model).name]

    def plan(self, lengths: Sequence[int], max_new_tokens: int) -> list[Batch]:
        """One batch: vLLM schedules by itself."""
        return [Batch(tuple(range(len(lengths))), len(lengths))] if lengths else []

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, rows: int, on_finished: Callable[[], Any], *stop: int
    ) -> list[list[int]]:
        ends = {"stop_token_ids": list(stop)} if stop else {}
        greedy = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens, **ends)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(requests, greedy)
        for _ in outputs:
            on_finished()
        return [list(output.outputs[0].token_ids) for output in outputs]

    def plan_options(self, lengths: Sequence[Sequence[int]]) -> list[Batch]:
        raise UserError(NO_OPTIONS)

    def log_likelihoods(self, sequences: Sequence[Scored], rows: int, on_finished: Callable[[], Any]) -> list[float]:
        raise UserError(NO_OPTIONS)
