"""Every check, in the order they run: the quick ones first."""

from neuroada.doctor.check import Check
from neuroada.doctor.kernels import Product, SampledGradient
from neuroada.doctor.measured import SHAPES, LessMemory, PlannedMemory, StepTime
from neuroada.doctor.packing import Packing
from neuroada.doctor.training import Bf16Curve, EngineCurve

CHECKS: list[Check] = [
    SampledGradient(),
    Product(),
    Packing("sdpa", "fp32", 1e-4, flash=False),
    Packing("flash-attn", "bf16", 3e-2, flash=True),
    *(made(shape) for shape in SHAPES for made in (PlannedMemory, LessMemory, StepTime)),
    Bf16Curve(),
    EngineCurve("zero2", {"name": "deepspeed", "ds_config": "zero2"}, "deepspeed"),
    EngineCurve("zero3", {"name": "deepspeed", "ds_config": "zero3"}, "deepspeed"),
    EngineCurve("fsdp2", {"name": "fsdp2"}, "torch"),
]
