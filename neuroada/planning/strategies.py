"""What one rank holds at the peak of a step, under every strategy: the recorded step, with the parameters cut the
strategy's way.

| strategy | each rank stores whole | each rank stores 1/N | on top, for a while |
| --- | --- | --- | --- |
| single, zero0 | everything | | |
| zero1 | parameters, gradients | fp32 master copy, moments | gradient buckets |
| zero2 | parameters | gradients, fp32 master copy, moments | gradient buckets |
| zero3 | | parameters, gradients, master copy, moments | gathered parameters, a gradient bucket |
| fsdp2 | | parameters, gradients, moments | gathered layers, a layer's whole gradients |
| fsdp2_hybrid | | as fsdp2, cut over engine.shard_size ranks | as fsdp2 |
| fsdp2_offload | | (in host memory) | as fsdp2 |
| zero3_hpz | | as zero3, and a second copy of the parameters cut over zero_hpz_partition_size ranks | as zero3 |
| zero3_offload | | (in host memory) | as zero3 |

DeepSpeed's rules are read in its source (0.19.8): `setup_buckets` of stage_1_and_2.py (two buffers of
reduce_bucket_size with overlap_comm), `_create_fp16_sub_groups` and the bucket of stage3.py, and for what stays
gathered, fetch_sub_module and __params_to_release of partitioned_param_coordinator.py. The engine trains without
DeepSpeed's bf16 mode, so delta, bucket, gradients, master copy and moments are fp32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neuroada.config.ds_config import zero_options
from neuroada.planning.step import Parameter, Step
from neuroada.planning.timeline import ACTIVATIONS, GRADIENTS, TEMPORARY, USE
from neuroada.sharding.count import kept_numel

STRATEGIES = ("single", "zero0", "zero1", "zero2", "fsdp2", "zero3_hpz", "zero3", "zero3_offload")
"""From the cheapest to run to the dearest: more communication to the right."""

FP32 = 4
FSDP2_LAYERS = 3  # whole layers at a time: the running one, the next one arriving, and the buffer it arrives in

SHARDED = ("fsdp2", "zero3_hpz", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak. host_bytes: kept in the host's memory instead (offload)."""

    by_kind: dict[str, int]
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.by_kind.values())


def memory(step: Step, strategy: str, world_size: int, options: dict[str, Any] | None = None) -> Memory:
    """One rank's memory at the peak of `step` under `strategy` on `world_size` ranks.

    options: of DeepSpeed, a zero_optimization section other than that of ds_configs/<strategy>.json; of fsdp2, the
        fields of the recipe's engine section that change what a rank stores (shard_size, cpu_offload).
    """
    zero = zero_options(strategy) if options is None else options
    sharded = strategy in SHARDED
    shards = shard_ranks(world_size, options)
    trained = [param for param in step.params if param.trained]

    def share(param: Parameter) -> int:
        return share_of(param, shards, strategy)

    trained_here = sum(share(param) for param in trained)
    kept: dict[str, int] = dict.fromkeys(("weights", "idx", "delta"), 0)
    for param in step.params:
        numel = share(param) if sharded else param.numel
        kept[param.kind] = kept.get(param.kind, 0) + numel * param.itemsize
        if strategy == "zero3_hpz":
            kept[param.kind] += share_of(param, int(zero["zero_hpz_partition_size"]), strategy) * param.itemsize
    if strategy in ("single", "zero0"):
        kept["optimizer"] = 2 * sum(param.nbytes for param in trained)
    elif strategy == "fsdp2":
        kept["optimizer"] = 2 * sum(share(param) * param.itemsize for param in trained)
    else:
        kept["optimizer"] = 3 * FP32 * trained_here  # master copy and two moments

    gradients = step.timeline.live(GRADIENTS)
    reducing = np.zeros_like(gradients)  # whole ones, for a while
    if step.accumulating:
        gradients = np.full_like(gradients, sum(param.nbytes for param in trained))
    if strategy == "zero2" or strategy.startswith("zero3"):
        gradients = np.full_like(gradients, FP32 * trained_here)  # whole ones stand in the buckets only
    elif strategy == "fsdp2":
        gradients = np.full_like(gradients, sum(share(p) * p.itemsize for p in trained))
        reducing += max(_reduced_by_layer(trained, shards).values(), default=0)

    offloaded = strategy == "zero3_offload" or bool((options or {}).get("cpu_offload"))
    host_bytes = 0
    if offloaded:
        host_bytes = sum(kept.values()) + int(gradients.max())
        kept, gradients = dict.fromkeys(kept, 0), np.zeros_like(gradients)
    kept["idx"] += step.whole_indices  # which no strategy divides or offloads
    moving = {
        "gradients": gradients + reducing,
        "activations": step.timeline.live(ACTIVATIONS),
        "temporary": step.timeline.live(TEMPORARY),
        "buckets": _buckets(step, strategy, zero),
        "gathered": _gathered(step, strategy, zero, shards),
    }
    peak = int(sum(moving.values()).argmax())
    by_kind = kept | {kind: int(curve[peak]) for kind, curve in moving.items()}
    return Memory(by_kind, host_bytes)


def shard_ranks(world_size: int, options: dict[str, Any] | None) -> int:
    """Over how many ranks a sharded parameter is cut; every group of so many has all of it."""
    return int((options or {}).get("shard_size") or world_size)


def share_of(param: Parameter, ranks: int, strategy: str) -> int:
    """Elements that the fullest of `ranks` stores of a parameter; fsdp2 cuts between rows, so between experts."""
    shape = torch.Size((param.rows, param.numel // param.rows))
    return kept_numel(shape, ranks, "fsdp2" if strategy == "fsdp2" else "zero3")


def _buckets(step: Step, strategy: str, zero: dict[str, Any]) -> np.ndarray:
    """Bytes of DeepSpeed's gradient buckets after each event: ZeRO-3's one stays, the others' come with backward."""
    nbytes = int(zero.get("reduce_bucket_size", 5e8)) * FP32
    here = np.ones_like(step.timeline.delta)
    if strategy in ("zero1", "zero2"):
        segments = step.timeline.names
        first = next((number for number, (name, _) in enumerate(segments) if name == "backward"), len(segments) - 1)
        here = (step.timeline.segment >= first) * (2 if zero.get("overlap_comm") else 1)
    elif not strategy.startswith("zero3"):
        nbytes = 0
    return here * nbytes


def _bytes_by_layer(params: list[Parameter], ranks: int) -> dict[int | None, int]:
    """Of what FSDP2 gathers from `ranks`: as much from each."""
    sizes: dict[int | None, int] = {}
    for param in params:
        sizes[param.layer] = sizes.get(param.layer, 0) + ranks * share_of(param, ranks, "fsdp2") * param.itemsize
    return sizes


def _reduced_by_layer(trained: list[Parameter], ranks: int) -> dict[int | None, int]:
    """Bytes of a layer's whole gradients and of their reduce-scatter under FSDP2, in fp32."""
    sizes: dict[int | None, int] = {}
    for param in trained:
        padded = ranks * share_of(param, ranks, "fsdp2")
        sizes[param.layer] = sizes.get(param.layer, 0) + padded * (param.itemsize + FP32)
    return sizes


def _gathered(step: Step, strategy: str, zero: dict[str, Any], shards: int) -> np.ndarray:
    """Bytes of gathered parameters after each event of the step's timeline."""
    if strategy == "fsdp2":
        sizes = _bytes_by_layer(step.params, shards)
        outside = sizes.pop(None, 0)  # embedding, last norm and head: one group, gathered until backward is through
        whole = outside + FSDP2_LAYERS * max(sizes.values(), default=0)
        optimizer = [number for number, (name, _) in enumerate(step.timeline.names) if name == "optimizer"]
        return np.where(np.isin(step.timeline.segment, optimizer), 0, whole)
    if strategy not in SHARDED:
        return np.zeros(len(step.timeline.delta), dtype=np.int64)
    return _gathered_by_zero3(step, zero)


def _gathered_by_zero3(step: Step, zero: dict[str, Any]) -> np.ndarray:
    """DeepSpeed's coordinator, replayed on the sequence of modules that run.

    Before a module runs, its parameters are gathered, and those of the next modules up to stage3_prefetch_bucket_size
    elements while no more than stage3_max_live_parameters are gathered. After it has run they are released, unless
    they are needed again within stage3_max_reuse_distance elements of modules.
    """
    prefetch = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    max_live = int(zero.get("stage3_max_live_parameters", 1e9))
    reuse_distance = int(zero.get("stage3_max_reuse_distance", 1e9))

    timeline = step.timeline
    places = np.flatnonzero(timeline.kind == USE)
    uses = timeline.group[places].tolist()
    numels = [sum(param.numel for param in group) for group in step.groups]
    sizes = [sum(param.nbytes for param in group) for group in step.groups]
    numel = [numels[use % len(numels)] for use in uses]
    size = [sizes[use % len(sizes)] for use in uses]
    before = np.concatenate([[0], np.cumsum(numel)])  # elements traversed before each use
    next_use: list[int | None] = [None] * len(uses)
    last: dict[int, int] = {}
    for i in range(len(uses) - 1, -1, -1):
        next_use[i] = last.get(uses[i])
        last[uses[i]] = i

    gathered: set[int] = set()
    live = live_bytes = 0
    curve = np.zeros(len(timeline.delta), dtype=np.int64)
    ahead = 0
    for i, use in enumerate(uses):
        if use not in gathered:
            gathered.add(use)
            live, live_bytes = live + numel[i], live_bytes + size[i]
        ahead, room = max(ahead, i + 1), min(prefetch, max_live - live)
        while ahead < len(uses) and room > 0:
            if uses[ahead] not in gathered:
                gathered.add(uses[ahead])
                live, live_bytes = live + numel[ahead], live_bytes + size[ahead]
                room -= numel[ahead]
            ahead += 1
        end = places[i + 1] if i + 1 < len(uses) else len(curve)
        curve[places[i] : end] = live_bytes
        again = next_use[i]
        if again is None or (before[again] - before[i + 1] >= reuse_distance and again >= ahead):
            gathered.discard(use)
            live, live_bytes = live - numel[i], live_bytes - size[i]
    optimizer = [number for number, (name, _) in enumerate(timeline.names) if name == "optimizer"]
    curve[np.isin(timeline.segment, optimizer)] = 0
    return curve
