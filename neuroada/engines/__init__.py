"""What holds the model and runs a step: one process, DeepSpeed ZeRO-1/2/3, FSDP2."""

from neuroada.engines.base import (
    STATE,
    Engine,
    ModelBuilder,
    Reader,
    adamw,
    base_parameters,
    evaluating,
    find_device,
    make_engine,
    trainable_parameters,
)

__all__ = [
    "STATE",
    "Engine",
    "ModelBuilder",
    "Reader",
    "adamw",
    "base_parameters",
    "evaluating",
    "find_device",
    "make_engine",
    "trainable_parameters",
]
