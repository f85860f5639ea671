"""DeepSpeed ZeRO-1, 2 and 3, by `deepspeed.initialize` alone.

bf16 stays out of DeepSpeed's config on purpose: it would cast the deltas to bf16. The frozen weights are loaded in the
recipe's dtype and the deltas train in fp32, so every engine computes with the same numbers.
"""

import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from neuroada import sharding
from neuroada.config.ds_config import read_ds_config
from neuroada.config.recipe import Recipe
from neuroada.engines.base import STATE, ModelBuilder, Reader, adamw, find_device, trainable_parameters
from neuroada.engines.watchdog import collective_timeout
from neuroada.environment import joining, rank, world_size
from neuroada.sharding.zero3 import own_part


class DeepSpeedEngine:
    def __init__(self, recipe: Recipe) -> None:
        self.rank, self.world_size = rank(), world_size()
        config = read_ds_config(recipe, self.world_size)
        self.device = find_device()
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # DeepSpeed 0.19.8 calls two functions by names that torch 2.13 deprecates: a warning for every collective call.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        # On CPU DeepSpeed 0.19.8 would compile this operator (of inference) at every first start, and a start that was
        # killed meanwhile leaves a lock behind for which the next ones wait for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with joining():
            deepspeed.init_distributed(
                dist_backend="nccl" if self.device.type == "cuda" else "gloo",
                timeout=collective_timeout(recipe.train.step_timeout_minutes),
            )
        self.recipe = recipe
        self.strategy = f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
        self.config = {
            **config,
            "train_micro_batch_size_per_gpu": recipe.micro_batch(self.world_size),
            "gradient_accumulation_steps": recipe.micro_batches(self.world_size),
            "gradient_clipping": recipe.optimizer.max_grad_norm or 0.0,
            # torch's AdamW, as everywhere else: DeepSpeed would insist on its own with CPU offload.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }

    def describe(self) -> str:
        return f"{self.strategy} ({self.recipe.engine.ds_config})"

    def load(self, builder: ModelBuilder) -> nn.Module:
        from transformers.integrations import HfDeepSpeedConfig

        # While it lives, from_pretrained partitions the weights as it loads them (ZeRO-3), in the dtype it names, and
        # PEFT gathers those that it reads.
        alive = HfDeepSpeedConfig({**self.config, "bf16": {"enabled": builder.dtype == torch.bfloat16}})
        model = builder.attach(builder.pretrained(self.device))
        del alive
        return model

    def start(self, model: nn.Module, micro_batches: int) -> None:
        import deepspeed

        optimizer = adamw(model, self.recipe)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        self.model = self.engine
        self.micro_batches = micro_batches

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages gradients over ranks, and this engine over micro batches: undo both.
        self.engine.backward(loss * (self.world_size * self.micro_batches))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro batch

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def release(self) -> None:
        self.engine.empty_partition_cache()  # of ZeRO-3: modules whose input needs no gradient stay gathered

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def moments(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        return {name: safe_get_full_optimizer_state(param, name).view(sharding.shape(param)) for name in STATE}

    def restore(self, step: int, read: Reader, backward_once: Callable[[], object]) -> None:
        # DeepSpeed's setters need AdamW's state, which its first step makes: take one at a rate of 0.
        backward_once()
        self.step(lr=0.0)
        for name, param in trainable_parameters(self.engine.module):
            saved = read(name, param)
            set_value, set_state = _setters(param)
            set_value(param, saved["value"])
            for key in STATE:
                set_state(param, saved[key], key)
            # They leave the model's own copy stale until the next step ...
            sharding.write_rows(param, slice(0, len(saved["value"])), saved["value"].to(self.device))
        # ... and do not reach AdamW's step count.
        for state in self.engine.optimizer.optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(step))


def _setters(param: nn.Parameter) -> tuple[Callable[..., None], Callable[..., None]]:
    """DeepSpeed's setters of a parameter's fp32 master and optimizer state, both taking whole values."""
    from deepspeed import utils

    if sharding.is_whole(param):
        return utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    # Under ZeRO-3 the "full" ones fail where the last rank's part is padded (0.19.8): cut here, set the local part.
    return (
        lambda param, value: utils.safe_set_local_fp32_param(param, own_part(param, value)),
        lambda param, value, key: utils.safe_set_local_optimizer_state(param, own_part(param, value), key),
    )
