"""GLUE with an encoder: texts to labels instead of prompts to answers; the rest of a run is the same."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.engines import Engine
from neuroada.errors import UserError
from neuroada.hf.head import is_head, start_head
from neuroada.objectives.base import Objective
from neuroada.objectives.epoch_validation import EpochValidation, losses
from neuroada.objectives.micro_batch import MicroBatch
from neuroada.objectives.texts import Texts, encode_texts
from neuroada.tasks.data import fingerprint, load_examples
from neuroada.tasks.hold_out import hold_out


class Classification(Objective):
    """Cross-entropy over the task's classes; of a regression squared error."""

    name = "classification"
    task_type = "SEQ_CLS"
    loss_unit = "per text"
    pipeline_tag = "text-classification"
    auto_name = "AutoModelForSequenceClassification"
    generates = False
    vocabulary_head = False

    data: Texts

    def check(self) -> None:
        if self.recipe.train.packed:
            raise UserError("train.packing = true: an encoder reads one text, or pair, a row; set it to false")
        if other := [name for name in self.recipe.evaluate.tasks or [] if name != self.task.name]:
            raise UserError(
                f"evaluate.tasks: a classifier of {self.task.name} cannot be scored on {', '.join(other)}; leave the "
                f"field out"
            )

    def load_data(self, tokenizer: Any) -> Texts:
        recipe = self.recipe
        examples, *_ = hold_out(load_examples(self.task, "train", recipe.data_dir), recipe.train.held_out)
        self.tokenizer, self.data_fingerprint = tokenizer, fingerprint(examples)
        self.data = encode_texts(examples, self.task, tokenizer, recipe.train.max_length)
        return self.data

    def auto_class(self) -> tuple[Any, dict[str, Any]]:
        auto, _ = super().auto_class()
        return auto, {"num_labels": self.task.num_labels}

    def checkpoint_has(self, name: str) -> bool:
        return not is_head(name)

    def start(self, model: nn.Module) -> None:
        start_head(model, self.recipe.train.seed)

    def collate(self, chosen: np.ndarray) -> MicroBatch:
        return self.data.collate(chosen, self.tokenizer.pad_token_id)

    def summed_loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return losses(model(**batch.inputs).logits.float(), batch.targets).sum()

    def normaliser(self, batch: np.ndarray) -> int:
        return len(batch)

    def longest_batch(self, vocab_size: int) -> MicroBatch:
        train = self.recipe.train
        shape = (train.micro_batch_size, train.max_length)
        ids = torch.arange(train.max_length).remainder(vocab_size).expand(shape).contiguous()
        inputs = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}
        return MicroBatch(inputs, torch.zeros(train.micro_batch_size), 0)

    def validation(self, engine: Engine) -> EpochValidation:
        return EpochValidation(engine, self.recipe, self.task, self.tokenizer, len(self.data))

    def compared_losses(
        self, entry: Mapping[str, Any], load: Callable[[], tuple[nn.Module, Any]]
    ) -> dict[str, float | None]:
        """As the run's own validation recorded them."""
        if not entry:
            return {"validation": None}
        return {"validation": entry["validation"]["loss"], "test": entry["loss"]}

    def before(self) -> Recipe | None:
        """The classifier alone, trained the same way over the encoder as it is."""
        if not self.recipe.evaluate.frozen_base:
            return None
        adapter = self.recipe.adapter  # of which the other fields are its method's own
        return self.recipe.model_copy(
            update={
                "adapter": type(adapter)(method="head", target_modules=adapter.target_modules),
                "evaluate": self.recipe.evaluate.model_copy(update={"frozen_base": False}),
                "output_dir": str(Path(self.recipe.output_dir) / "frozen_base"),
            }
        )
