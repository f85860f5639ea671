"""Preference tuning: of two answers to a prompt, the better one is to become the likelier one."""

from abc import abstractmethod

import numpy as np
import torch
from torch import nn

from neuroada.data import TokenData
from neuroada.errors import UserError
from neuroada.hf.adapters_off import adapters_off
from neuroada.objectives.micro_batch import MicroBatch
from neuroada.objectives.own_data import OwnData
from neuroada.objectives.preference_losses import dpo_loss, odds_ratio_loss, sequence_log_probs
from neuroada.registry import METHODS


class Preference(OwnData):
    """Items are pairs: sequence 2i of a micro batch is chosen, 2i + 1 rejected."""

    pairs = True
    terms: int  # sums that make up the loss

    @abstractmethod
    def sums(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Forward; the summed losses of this batch, [terms] fp32."""

    @abstractmethod
    def normalisers(self, data: TokenData, items: np.ndarray) -> torch.Tensor:
        """What each of them is divided by, of the whole of `items`: [terms] fp32."""

    def summed_loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return self.sums(model, batch).sum()

    def normaliser(self, batch: np.ndarray) -> int:
        return int(self.data.units[batch].sum())

    def loss(self, model: nn.Module, chosen: np.ndarray, of: np.ndarray, device: torch.device) -> torch.Tensor:
        sums = self.sums(model, self.collate(chosen).to(device))
        return (sums / self.normalisers(self.data, of).to(device)).sum()

    def held_out_parts(
        self, model: nn.Module, data: TokenData, chosen: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        return self.sums(model, self._collate(data, chosen, self.recipe.train.packed).to(device))

    def held_out_loss(self, sums: torch.Tensor, data: TokenData) -> float:
        return (sums.cpu() / self.normalisers(data, np.arange(len(data)))).sum().item()


def log_probs(model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """([pairs, 2] fp32, [pairs, 2] int64): summed log-probabilities of each pair's answers, and their tokens."""
    assert batch.sequence is not None
    logits = model(**batch.inputs, use_cache=False).logits
    sums, counts = sequence_log_probs(logits, batch.targets, batch.sequence)
    return sums.view(-1, 2), counts.view(-1, 2)


class DPO(Preference):
    """Direct preference optimisation. The reference is the same model with its adapter off: no second copy of it."""

    name = "dpo"
    loss_unit = "per pair"
    terms = 1

    def check(self) -> None:
        if not hasattr(METHODS.load(self.recipe.adapter.method), "prefix"):
            raise UserError(
                f"objective.name = dpo: the reference is the model with its adapter off, and adapter.method = "
                f"{self.recipe.adapter.method} has none; use neuroada or lora, or objective.name=orpo"
            )

    def sums(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad(), adapters_off(model):
            reference, _ = log_probs(model, batch)
        policy, _ = log_probs(model, batch)
        losses = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], self.recipe.objective.beta)
        return losses.sum()[None]

    def normalisers(self, data: TokenData, items: np.ndarray) -> torch.Tensor:
        return torch.tensor([float(data.units[items].sum())])


class ORPO(Preference):
    """Odds-ratio preference optimisation: cross-entropy of the chosen answers, plus beta times the odds-ratio term."""

    name = "orpo"
    loss_unit = "nats per chosen token, plus beta times the odds ratio's per pair"
    terms = 2

    def sums(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        sums, counts = log_probs(model, batch)
        means = sums / counts
        ratio = odds_ratio_loss(means[:, 0], means[:, 1])
        return torch.stack([-sums[:, 0].sum(), self.recipe.objective.beta * ratio.sum()])

    def normalisers(self, data: TokenData, items: np.ndarray) -> torch.Tensor:
        return torch.tensor([float(data.chosen_tokens[items].sum()), float(data.units[items].sum())])
