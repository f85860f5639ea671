"""Two ranks that transformers splits by its own plan follow a folder.

torchrun --nproc-per-node 2 tests/sync/ranks_tensor_parallel.py argument.json
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sync_models import logits
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from neuroada.sync import FolderTransport, ModelWeights, Receiver, follow


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: param.detach().full_tensor() if isinstance(param, DTensor) else param.detach().clone()
        for name, param in model.named_parameters()
    }


def main() -> None:
    argument = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(argument["model"], tp_plan="auto", dtype=torch.float32)
    base = whole(model)
    split = [name for name, param in model.named_parameters() if isinstance(param, DTensor)]
    receiver = Receiver(ModelWeights(model))
    version = follow(receiver, FolderTransport(argument["folder"]))
    tensors = {**whole(model), "logits": logits(model)}
    receiver.restore()
    after = whole(model)
    found = {"version": version, "split": split, "base back": all(after[name].equal(base[name]) for name in base)}
    file = Path(argument["folder"]) / f"{dist.get_rank()}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"found": json.dumps(found)})
    dist.barrier()
    os._exit(0)  # at Python's own exit torch's gloo threads abort now and then


if __name__ == "__main__":
    main()
