"""Ten optimizer steps under an engine; after each, whether every rank's receiver computes the trainer's logits.

    torchrun --nproc-per-node 2 tests/sync/ranks_sync.py argument.json

argument.json: {"model": folder, "out": folder, "cases": [[engine, dtype, k]]}
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from sync_models import TARGETS, bits, plain, same_bits
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from neuroada import NeuroAdaConfig
from neuroada.errors import UserError
from neuroada.sync import FolderTransport, ModelWeights, Receiver, Sender, follow, publish

STEPS, IDS = 10, torch.arange(2, 50).view(4, 12)


def adapted_model(base: Any, k: int) -> Any:
    return get_peft_model(base, NeuroAdaConfig(k=k, target_modules=TARGETS))


class Plain:
    """One process, or DeepSpeed under its configuration."""

    def __init__(self, folder: str, dtype: torch.dtype, k: int, stage: int) -> None:
        self.stage = stage
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 1_000_000,
                "stage3_param_persistence_threshold": 0,
            },
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        alive = None
        if stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            alive = HfDeepSpeedConfig({**config, "bf16": {"enabled": dtype == torch.bfloat16}})
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        del alive
        self.model: Any = adapted_model(base, k)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        if stage:
            import deepspeed

            self.model, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)

    def step(self, loss: torch.Tensor) -> None:
        if self.stage:
            self.model.backward(loss)
            self.model.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class Fsdp2:
    def __init__(self, folder: str, dtype: torch.dtype, k: int, mesh: DeviceMesh | None = None) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model: Any = adapted_model(base, k)
        for block in base.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make(engine: str, folder: str, dtype: torch.dtype, k: int) -> Plain | Fsdp2:
    if engine == "fsdp2":
        return Fsdp2(folder, dtype, k)
    return Plain(folder, dtype, k, {"single": 0, "zero1": 1, "zero2": 2, "zero3": 3}[engine])


def run_case(argument: dict[str, Any], engine: str, dtype_name: str, k: int) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dtype = getattr(torch, dtype_name)
    trainer = make(engine, argument["model"], dtype, k)
    receiver_model = plain(argument["model"], dtype)
    base = bits(receiver_model)
    transport = FolderTransport(Path(argument["out"]) / f"messages-{engine}-{dtype_name}-{k}-{ranks}")
    sender, receiver = Sender(trainer.model), Receiver(ModelWeights(receiver_model))
    said: dict[str, Any] = {"equal": [], "versions": [], "changed": []}
    for _ in range(STEPS):
        logits = trainer.model(input_ids=IDS[rank::ranks]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[rank::ranks, 1:].flatten())
        trainer.step(loss)
        publish(sender, transport)
        dist.barrier()
        said["versions"].append(follow(receiver, transport))
        dist.barrier()
        found = trainer.model(input_ids=IDS).logits.detach()
        said["equal"].append(found.equal(receiver_model(input_ids=IDS).logits.detach()))
        said["changed"].append(not same_bits(bits(receiver_model), base))
    with Collectives() as travelled:
        sender.message()
    said["travelled"] = travelled.largest
    said["rows"] = {name: [m.first, m.last] for name, m in _state(sender).items()}
    receiver.restore()
    said["base back"] = same_bits(bits(receiver_model), base)
    return said


def _state(sender: Sender) -> dict[str, Any]:
    from neuroada.sync.message import decode

    return decode(sender.message(state=True)).header.modules or {}


class Collectives(TorchDispatchMode):
    """The elements of the largest tensor that travels while the block runs."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.largest = max(self.largest, *(tensor.numel() for tensor in tensors))
        return func(*args, **(kwargs or {}))


def hybrid(folder: str) -> str:
    """What the sender says of two replicas of a model."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    try:
        Sender(Fsdp2(folder, torch.float32, 3, mesh).model).message()
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    argument = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for inference
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    found = {"|".join(map(str, case)): run_case(argument, *case) for case in argument["cases"]}
    if argument.get("hybrid"):
        found["hybrid"] = {"said": hybrid(argument["model"])}
    out = Path(argument["out"]) / f"said-{dist.get_world_size()}-{dist.get_rank()}.json"
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # at Python's own exit torch's gloo threads abort now and then


if __name__ == "__main__":
    main()
