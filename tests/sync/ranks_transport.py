"""Ranks 0 and 1 train, ranks 2 and 3 receive; rank 3's engine is lost before the third version.

torchrun --nproc-per-node 4 tests/sync/ranks_transport.py argument.json
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from sync_models import change, logits, plain, tuned

from neuroada.sync import DistributedTransport, ModelWeights, Receiver, Sender, follow, publish

SENDERS, RECEIVERS, VERSIONS = [0, 1], [2, 3], 5


def main() -> None:
    argument = json.loads(Path(sys.argv[1]).read_text())
    model, out = Path(argument["model"]), Path(argument["out"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trainers = dist.new_group(SENDERS)
    transport = DistributedTransport(SENDERS, RECEIVERS)
    if rank in SENDERS:
        trainer = tuned(model)
        sender = Sender(trainer, group=trainers)
        for version in range(VERSIONS):
            change(trainer, version)
            assert publish(sender, transport) == version
            if rank == 0:
                save_file({"logits": logits(trainer)}, out / f"trainer-{version}.safetensors")
    else:
        engine = plain(model)
        receiver, found = Receiver(ModelWeights(engine)), {}
        versions = []
        for version in range(VERSIONS):
            if rank == 3 and version == 2:
                engine = plain(model)
                receiver = Receiver(ModelWeights(engine))
            versions.append(follow(receiver, transport))
            found[f"logits {version}"] = logits(engine)
        save_file(found, out / f"{rank}.safetensors", {"versions": json.dumps(versions)})
    dist.barrier()
    os._exit(0)  # at Python's own exit torch's gloo threads abort now and then


if __name__ == "__main__":
    main()
