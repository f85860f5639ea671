"""FSDP2, by torch's `fully_shard` alone: every parameter a DTensor sharded by rows.

The model is built on the meta device and gets its memory block by block, each sharded before the next one exists; then
every rank reads its own rows from the checkpoint's files and selects on them. No rank ever holds more than a block.

With engine.shard_size (hybrid sharding) the ranks form a mesh of two dimensions: rows are sharded over so many
consecutive ranks, and every other group of as many holds the same. Weights are gathered within a group; only the
gradients of what trains, a rank's rows of them, are summed between groups.

With engine.cpu_offload a rank's rows, their gradients and moments stay in host memory: rows travel to the device when
they are gathered, gradients back when they are reduced, and AdamW and the clipping of gradients run on the CPU.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from neuroada import sharding
from neuroada.config.recipe import Recipe
from neuroada.engines.base import STATE, ModelBuilder, Reader, adamw, find_device, trainable_parameters
from neuroada.engines.watchdog import collective_timeout
from neuroada.environment import joining, rank, world_size
from neuroada.errors import UserError
from neuroada.hf.tensor_files import Checkpoint, resolve
from neuroada.hf.weights import fill, wanted


class Fsdp2Engine:
    strategy = "fsdp2"

    def __init__(self, recipe: Recipe) -> None:
        if torch.__version__ < "2.12":  # every sharded parameter first asks for a gradient there
            raise UserError(
                f"engine.name = fsdp2: FSDP2 of torch {torch.__version__} cannot shard integers, the indices; "
                f"install torch 2.12 or newer, or use engine.name=deepspeed"
            )
        self.recipe = recipe
        self.rank, self.world_size = rank(), world_size()
        self.shards = recipe.engine.shards(self.world_size)
        self.device = find_device()
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            if backend == "nccl" and recipe.engine.cpu_offload:
                backend = "cpu:gloo,cuda:nccl"  # what is gathered of the parameters themselves lies in host memory
            with joining():
                dist.init_process_group(backend, timeout=collective_timeout(recipe.train.step_timeout_minutes))
        self.mesh = self._mesh()

    def _mesh(self) -> DeviceMesh | None:
        """None: torch's own, of all ranks."""
        if self.shards == self.world_size:
            return None
        shape = (self.world_size // self.shards, self.shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def describe(self) -> str:
        copies = self.world_size // self.shards
        hybrid = f", {copies} copies sharded over {self.shards} rank(s)" if copies > 1 else ""
        return f"{self.strategy}{hybrid}{', in host memory' if self.recipe.engine.cpu_offload else ''}"

    def _shard(self, module: nn.Module) -> None:
        pinned = self.device.type == "cuda"  # for copies beside the computation
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.recipe.engine.cpu_offload else OffloadPolicy()
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # of gradients, of bf16 parameters too
        fully_shard(module, mesh=self.mesh, mp_policy=precision, offload_policy=offload)

    def load(self, builder: ModelBuilder) -> nn.Module:
        files = Checkpoint(resolve(builder.source, "model ="), "model = ").file_of
        base: Any = builder.empty(self.device)
        base.tie_weights()
        model = builder.attach(base)
        blocks = [module for module in model.modules() if type(module).__name__ in (base._no_split_modules or ())]
        if not blocks:
            raise UserError(
                f"engine.name = fsdp2: {type(base).__name__} does not say what its blocks are; use deepspeed"
            )
        for block in blocks:
            self._materialise(block)
            self._shard(block)
        self._materialise(model)
        base.tie_weights()
        self._shard(model)

        fill(wanted(model, base.base_model_prefix, files, builder.checkpoint_has), files)
        builder.initialise(model)
        return model

    def _materialise(self, root: nn.Module) -> None:
        """Give memory to the parameters that are still on the meta device; buffers are real already."""
        for module in root.modules():
            if any(param.is_meta for param in module.parameters(recurse=False)):
                module.to_empty(device=self.device, recurse=False)

    def start(self, model: nn.Module, micro_batches: int) -> None:
        self.model = model
        self.optimizer = adamw(model, self.recipe)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.world_size).backward()  # FSDP averages gradients over ranks

    def step(self, lr: float) -> float:
        limit = self.recipe.optimizer.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_([param for _, param in trainable_parameters(self.model)], limit)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return cast(DTensor, norm).full_tensor().item()

    def release(self) -> None:
        pass  # backward has resharded everything

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def moments(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        return {name: self.optimizer.state[param][name].full_tensor() for name in STATE}

    def restore(self, step: int, read: Reader, backward_once: Callable[[], object]) -> None:
        for name, param in trainable_parameters(self.model):
            saved = read(name, param)
            everything = slice(0, len(saved["value"]))
            sharding.write_rows(param, everything, saved["value"])
            state: dict[str, torch.Tensor] = {"step": torch.tensor(float(step))}
            for key in STATE:
                state[key] = torch.zeros_like(param)
                sharding.write_rows(state[key], everything, saved[key])
            self.optimizer.state[param] = state
