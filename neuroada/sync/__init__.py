"""Rollouts that hold the trainer's exact weights: the values at the connections travel, and nothing else.

    sender = Sender(model)                                  # a PEFT model under any engine
    receiver = Receiver(ModelWeights(plain_model))          # an ordinary Hugging Face model on the same base
    publish(sender, transport)                              # after an optimizer step, on every rank
    follow(receiver, transport)                             # before generating

docs/sync.md has the message format and the guarantees.
"""

from neuroada.sync.lock import ReadWriteLock
from neuroada.sync.message import Header, SyncError, WrongBase
from neuroada.sync.placement import Shard
from neuroada.sync.receiver import Receiver, Weights
from neuroada.sync.sender import Sender
from neuroada.sync.transports import DistributedTransport, FolderTransport, Pipe, Transport, follow, publish
from neuroada.sync.weights import ModelWeights

__all__ = [
    "DistributedTransport",
    "FolderTransport",
    "Header",
    "ModelWeights",
    "Pipe",
    "ReadWriteLock",
    "Receiver",
    "Sender",
    "Shard",
    "SyncError",
    "Transport",
    "Weights",
    "WrongBase",
    "follow",
    "publish",
]
