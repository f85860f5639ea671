"""What this machine has, and what is missing."""

import os
import platform
import shutil
from importlib.util import find_spec

import torch
from pydantic import BaseModel, ConfigDict

from neuroada.ops import cpu_kernel
from neuroada.runs.formatting import format_bytes
from neuroada.runs.metadata import NOT_INSTALLED, code_version, library_version

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "safetensors", "tokenizers")
OPTIONAL = {
    "triton": "the sampled gradient's kernel on GPUs",
    "flash_attn": "packed rows on GPUs, in bf16",
    "vllm": "scoring and serving on GPUs",
    "bitsandbytes": "adapters over bases that it has quantised",
    "torchao": "adapters over bases that it has quantised",
}
"""Packages that may be missing, and what they are needed for."""


class Gpu(BaseModel):
    """A GPU as torch sees it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    memory_bytes: int
    compute_capability: str


class Tool(BaseModel):
    """Something that may be missing. found: its version, or "here"; None where it is missing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    found: str | None
    needed_for: str


class Environment(BaseModel):
    """The machine and its software. cuda, nccl: None without."""

    model_config = ConfigDict(extra="forbid", strict=True)

    neuroada: str
    python: str
    platform: str
    libraries: dict[str, str]
    cpu_cores: int
    memory_bytes: int
    disk_free_bytes: int
    gpus: list[Gpu]
    bf16: bool
    cuda: str | None
    nccl: str | None
    tools: list[Tool]

    def lines(self) -> list[tuple[str, str]]:
        """For a reader: (what, in words)."""
        gpus = [f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, sm {gpu.compute_capability}" for gpu in self.gpus]
        software = ", ".join(f"{name} {found}" for name, found in self.libraries.items())
        missing = [f"{tool.name} ({tool.needed_for})" for tool in self.tools if tool.found is None]
        return [
            ("versions", f"neuroada {self.neuroada}, python {self.python}, {software}"),
            ("machine", f"{self.platform}, {self.cpu_cores} cores, {format_bytes(self.memory_bytes)} of memory, "
                        f"{format_bytes(self.disk_free_bytes)} of disk free"),
            ("GPUs", f"{'; '.join(gpus)}; CUDA {self.cuda}, NCCL {self.nccl or 'missing'}, bf16 "
                     f"{'yes' if self.bf16 else 'no'}" if gpus else "none that torch can use"),
            ("here", ", ".join(f"{tool.name} {tool.found}" for tool in self.tools if tool.found) or "-"),
            ("missing", "; ".join(missing) or "-"),
        ]  # fmt: skip


def read_environment() -> Environment:
    """Of this process: the cores it may use, the GPUs it sees, the disk of its working folder."""
    here = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if here else []
    return Environment(
        neuroada=code_version(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        libraries={name: library_version(name) for name in LIBRARIES},
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free_bytes=shutil.disk_usage(".").free,
        gpus=[
            Gpu(name=gpu.name, memory_bytes=gpu.total_memory, compute_capability=f"{gpu.major}.{gpu.minor}")
            for gpu in gpus
        ],
        bf16=here and torch.cuda.is_bf16_supported(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if here and torch.distributed.is_nccl_available() else None,
        tools=_tools(),
    )


def _tools() -> list[Tool]:
    compiled = "here" if cpu_kernel.load() is not None else None
    programs = [
        Tool(name="C++ compiler", found=compiled, needed_for="the CPU kernels: without one, slower forms are used"),
        Tool(name="sbatch", found="here" if shutil.which("sbatch") else None, needed_for="neuroada submit, on SLURM"),
    ]
    return programs + [
        Tool(name=name, found=_found(name), needed_for=needed_for) for name, needed_for in OPTIONAL.items()
    ]


def _found(package: str) -> str | None:
    if find_spec(package) is None:
        return None
    version = library_version(package)
    return "here" if version == NOT_INSTALLED else version
