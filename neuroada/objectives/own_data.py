"""Own data: what the objectives over it share, and supervised fine-tuning, the plainest of them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neuroada.config.data import Data
from neuroada.data import TokenData, prepare
from neuroada.data.summary import runs_of_text, summarise
from neuroada.engines import Engine
from neuroada.errors import UserError
from neuroada.files import write_json
from neuroada.objectives.base import Objective
from neuroada.objectives.cross_entropy import answer_loss
from neuroada.objectives.loss_validation import LossValidation
from neuroada.objectives.micro_batch import MicroBatch, collate_sequences
from neuroada.tasks.validation_file import read_measured


class OwnData(Objective):
    """Examples of the recipe's `data:` section. pairs: whether they are preference pairs."""

    task_type = "CAUSAL_LM"
    pipeline_tag = "text-generation"
    auto_name = "AutoModelForCausalLM"
    pairs: bool

    data: TokenData
    held_out: TokenData | None = None

    @property
    def section(self) -> Data:
        assert self.recipe.data is not None
        return self.recipe.data

    def load_data(self, tokenizer: Any) -> TokenData:
        train = self.recipe.train
        needed = train.max_steps and train.max_steps * train.global_batch_size
        cache = Path(self.recipe.data_dir) / ".tokens"
        prepared = prepare(
            self.section, tokenizer, train.max_length, train.seed, cache, train.packing == "fill", needed
        )
        if prepared.pairs != self.pairs:
            found, name = ("are", "dpo or orpo") if prepared.pairs else ("are no", "sft")
            raise UserError(
                f"objective.name = {self.name}: the rows of {self.section.datasets[0].path} {found} preference pairs; "
                f"set objective.name={name}"
            )
        self.prepared = prepared
        self.tokenizer, self.data, self.held_out = tokenizer, prepared.train, prepared.validation
        self.data_fingerprint = prepared.fingerprint
        return self.data

    def write_data(self, folder: Path) -> None:
        """data.json: the summary, and the first sequences of the first step as [text, whether it is learnt]."""
        train, sequences = self.recipe.train, self.data.sequences(int(self.batch(0, 1)[0]))
        paths = [spec.path for spec in self.section.datasets]
        summary = summarise(self.prepared, paths, train.global_batch_size, train.micro_batch_size)
        shown = [runs_of_text(one, self.tokenizer) for one in sequences[:2]]
        write_json(folder / "data.json", {"summary": summary.to_json(), "examples": shown})

    def batch(self, step: int, size: int) -> np.ndarray:
        return self.data.batch(step, size)

    def collate(self, chosen: np.ndarray) -> MicroBatch:
        return self._collate(self.data, chosen, self.recipe.train.packed)

    def _collate(self, data: TokenData, chosen: np.ndarray, packed: bool) -> MicroBatch:
        sequences = [one for item in chosen for one in data.sequences(int(item))]
        return collate_sequences(sequences, packed, self.tokenizer.pad_token_id)

    def validation(self, engine: Engine) -> LossValidation | None:
        if self.held_out is None:
            return None
        return LossValidation(engine, self.recipe, self, self.held_out, len(self.data))

    @abstractmethod
    def held_out_parts(
        self, model: nn.Module, data: TokenData, chosen: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        """Forward without gradient of the held-out items `chosen`: their summed losses, [terms] fp32."""

    @abstractmethod
    def held_out_loss(self, sums: torch.Tensor, data: TokenData) -> float:
        """The loss of all held-out items, from the sums over them."""

    def compared_losses(
        self, entry: Mapping[str, Any], load: Callable[[], tuple[nn.Module, Any]]
    ) -> dict[str, float | None]:
        """Both are the loss on data.validation that the run recorded for the step it saved: there is no second set.

        The untrained model is measured here, on what is held out of a run with this recipe's seed.
        """
        recorded = Path(self.recipe.output_dir) / "validation.json"
        if recorded.is_file():
            loss = min(one["loss"] for one in read_measured(recorded) if one["step"] > 0)
            return {"validation": loss, "test": loss}
        model, tokenizer = load()
        return {"validation": None, "test": self._loss_of(model, tokenizer)}

    @torch.no_grad()
    def _loss_of(self, model: Any, tokenizer: Any) -> float:
        """The loss on data.validation of a model as it was loaded: padded, as its attention knows no packed rows."""
        recipe = self.recipe
        plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"packing": False})})
        measured = type(self)(plain)
        measured.load_data(tokenizer)
        data = measured.held_out
        assert data is not None
        rows = recipe.train.micro_batch_size
        parts = [np.arange(start, min(start + rows, len(data))) for start in range(0, len(data), rows)]
        sums = [measured.held_out_parts(model, data, part, model.device) for part in parts]
        return measured.held_out_loss(torch.stack(sums).sum(0), data)

    def longest_batch(self, vocab_size: int) -> MicroBatch:
        train = self.recipe.train
        sequences = [_Longest(train.max_length, vocab_size)] * (train.micro_batch_size * (2 if self.pairs else 1))
        batch = collate_sequences(sequences, packing=False, pad_id=0)
        if train.packed:
            del batch.inputs["attention_mask"]  # as CausalLM.longest_batch does
        return batch


class SupervisedFineTuning(OwnData):
    """Cross-entropy over the learnt tokens of every example."""

    name = "sft"
    loss_unit = "nats per learnt token"
    pairs = False

    def summed_loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return answer_loss(model, batch)

    def normaliser(self, batch: np.ndarray) -> int:
        return int(self.data.num_answer_tokens[batch].sum())

    def held_out_parts(
        self, model: nn.Module, data: TokenData, chosen: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        return answer_loss(model, self._collate(data, chosen, self.recipe.train.packed).to(device))[None]

    def held_out_loss(self, sums: torch.Tensor, data: TokenData) -> float:
        return sums.item() / int(data.num_answer_tokens.sum())


class _Longest:
    """A `Labelled` of one length, a loss on every token but the first."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.ids = np.arange(length, dtype=np.int32) % vocab_size
        self.learnt = np.arange(length) > 0
