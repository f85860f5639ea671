"""TRL's GRPOTrainer with rollouts from a model that holds the trainer's exact weights (TRL 1.16).

The reference model costs nothing: with `peft_config=NeuroAdaConfig(...)` TRL switches the adapter off to compute it,
which gives the base to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from neuroada.errors import UserError
from neuroada.sync.message import SyncError
from neuroada.sync.receiver import Receiver
from neuroada.sync.sender import Sender
from neuroada.sync.transports import Pipe, Transport, follow, publish
from neuroada.sync.weights import ModelWeights


class TrainerSync:
    """Brings a trainer's newest values to a receiver in the same process, on every rank.

    Args:
        receiver: of this rank's engine.
        transport: what the ranks' parts travel by: a `FolderTransport` where there are several ranks.
        barrier: waits until every rank has sent.
    """

    def __init__(self, receiver: Receiver, transport: Transport, barrier: Callable[[], Any]) -> None:
        self.receiver, self.transport, self.barrier = receiver, transport, barrier
        self.sender: Sender | None = None

    def __call__(self, model: nn.Module) -> int:
        """-> the version that trainer and engine now share. SyncError where the engine did not get there."""
        if self.sender is None:
            self.sender = Sender(model)
            if self.sender.parts > 1 and isinstance(self.transport, Pipe):
                raise UserError(
                    f"transport: a Pipe is one rank's, here are {self.sender.parts}: give a FolderTransport"
                )
        for _ in range(2):  # an engine that lacks something asks, and gets the state by the second
            version = publish(self.sender, self.transport)
            self.barrier()
            reached = follow(self.receiver, self.transport)
            if not self.sender.agree(reached != version):
                return version
        raise SyncError(f"the engine holds version {reached}, the trainer sent {version}: see the transport")


class Rollouts:
    """`rollout_func` of a GRPOTrainer: completions by a plain transformers model, synced once an optimizer step.

        trainer = GRPOTrainer(..., peft_config=NeuroAdaConfig(k=20), rollout_func=Rollouts(plain_model))

    Args:
        engine: the base model as the trainer loads it (same weights, same dtype), without an adapter.
        transport: as in `TrainerSync`.
    """

    def __init__(self, engine: PreTrainedModel, transport: Transport | None = None) -> None:
        self.engine = engine.eval()
        self.transport = transport or Pipe()
        self._sync: TrainerSync | None = None
        self._synced_at: int | None = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's contract: prompts, each already repeated for its generations, and the trainer -> token ids."""
        if self._sync is None:
            receiver = Receiver(ModelWeights(self.engine))
            self._sync = TrainerSync(receiver, self.transport, trainer.accelerator.wait_for_everyone)
        if self._synced_at != trainer.state.global_step:
            self._sync(trainer.model)
            self._synced_at = trainer.state.global_step
        prompt_ids, *_ = trainer._tokenize_prompts(prompts)
        return {"prompt_ids": prompt_ids, "completion_ids": self._generate(prompt_ids, trainer), "logprobs": None}

    @torch.no_grad()
    def _generate(self, prompt_ids: list[list[int]], trainer: Any) -> list[list[int]]:
        """One completion a prompt, by the trainer's sampling settings, its end token included."""
        tokenizer, device = trainer.processing_class, self.engine.device
        padded = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(device)
        width = padded["input_ids"].shape[1]
        made = self.engine.generate(**padded, generation_config=trainer.generation_config)[:, width:]
        ends = set(trainer.eos_token_ids)
        return [_until(row, ends) for row in made.tolist()]


def sync_colocated_vllm(trainer: Any, transport: Transport | None = None) -> TrainerSync:
    """Replace the weight sync of a GRPOTrainer whose vLLM runs in its own processes (use_vllm, vllm_mode="colocate").

    TRL's own merges the adapter and loads every weight of the model; this one sends the values at the connections, a
    rank's share by each rank, to vLLM's loader. Needs a vLLM with `CheckpointWeightPatch` (0.33 was read). Not run.
    """
    from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

    from neuroada.sync.vllm import CheckpointWeights, local_folder

    generation = trainer.vllm_generation
    if generation.mode != "colocate" or generation.enable_sleep_mode:
        raise UserError(
            f"vllm_mode = {generation.mode}, vllm_enable_sleep_mode = {generation.enable_sleep_mode}: this sync wants "
            f"colocate and False; a server follows by neuroada.sync.vllm.publish_to_vllm"
        )
    engine = generation.llm.llm_engine
    model = engine.model_executor.driver_worker.model_runner.model
    weights = CheckpointWeights(model, local_folder(engine.model_config.model), load_checkpoint_weight_patches)
    sync = TrainerSync(Receiver(weights), transport or Pipe(), trainer.accelerator.wait_for_everyone)

    def sync_weights() -> None:
        sync(trainer.model)
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights
    return sync


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Up to the first end token, and with it."""
    length = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]
