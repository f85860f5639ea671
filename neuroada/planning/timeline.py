"""Which bytes are alive when: a recording of every storage's birth and death, and its replay.

Recorded on fake tensors it is what a card would need, less its allocator's slack; recorded on real ones it checks that.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GRADIENTS, ACTIVATIONS, TEMPORARY, USE = range(4)
"""Kinds of an event. USE: a module begins to need its parameters, the event's group (no bytes)."""

_NEVER = 1 << 62


@dataclass
class Timeline:
    """Events of one step in order, as arrays of equal length. What is alive throughout is not among them.

    delta: bytes born (+) or freed (-). kind: as above. group: of USE, the number of the group of parameters, else -1.
    segment: the stretch the event belongs to, by `names`: a decoder layer's forward ("forward", i) or backward
    ("backward", i), or what lies between, such as ("head", 0).
    """

    delta: np.ndarray
    kind: np.ndarray
    group: np.ndarray
    segment: np.ndarray
    names: list[tuple[str, int]]

    def live(self, kind: int) -> np.ndarray:
        """Bytes of this kind alive after each event."""
        return np.cumsum(np.where(self.kind == kind, self.delta, 0))


class Recorder(TorchDispatchMode):
    """Records storages from `with recorder:` on. `known` storages are taken for granted and never recorded."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # storage's address -> its number
        self.kinds: dict[int, int] = {}  # number -> kind, where it is certain
        self.births: dict[int, int] = {}
        self.deaths: dict[int, int] = {}
        self.events: list[tuple[int, int, int]] = []  # delta, number, group
        self.marks: list[tuple[int, tuple[str, int]]] = [(0, ("start", 0))]
        self.forward_end = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.neuroada.sampled_gradient.default:
            self.transient(_sampled_gradient_workspace(*args))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: torch.Tensor, kind: int | None = None) -> None:
        """Record the tensor's storage if it is new; `kind` overrules what its life says."""
        if tensor.layout != torch.strided:
            return  # of SHiRA: its indices and values are tensors of their own
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        if key not in self.live:
            number = len(self.births)
            self.live[key] = number
            self.births[number] = len(self.events)
            self.events.append((storage.nbytes(), number, -1))
            weakref.finalize(storage, self._drop, key, storage.nbytes())
        if kind is not None:
            self.kinds[self.live[key]] = kind

    def transient(self, nbytes: int) -> None:
        """Memory that lives inside one operator."""
        number = len(self.births)
        self.births[number] = len(self.events)
        self.deaths[number] = len(self.events) + 1
        self.events += [(nbytes, number, -1), (-nbytes, number, -1)]

    def use(self, group: int) -> None:
        self.events.append((0, -1, group))

    def mark(self, name: str, layer: int = 0) -> None:
        """A new segment begins."""
        self.marks.append((len(self.events), (name, layer)))

    def end_forward(self) -> None:
        """What is alive now, was kept for backward."""
        self.forward_end = len(self.events)

    def timeline(self) -> Timeline:
        """The recording so far."""
        kind_of = [
            self.kinds.get(
                number, ACTIVATIONS if birth < self.forward_end <= self.deaths.get(number, _NEVER) else TEMPORARY
            )
            for number, birth in self.births.items()
        ]
        delta, number, group = (np.array(column, dtype=np.int64) for column in zip(*self.events, strict=True))
        kind = np.where(group >= 0, USE, np.array(kind_of)[number])
        starts = [start for start, _ in self.marks]
        segment = np.searchsorted(starts, np.arange(len(delta)), side="right") - 1
        return Timeline(delta, kind, group, segment, [name for _, name in self.marks])

    def _drop(self, key: int, nbytes: int) -> None:
        number = self.live.pop(key)
        self.deaths[number] = len(self.events)
        self.events.append((-nbytes, number, -1))


def _sampled_gradient_workspace(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> int:
    """Bytes the operator needs inside on a GPU: the Triton kernel's transposed copies of dy and x."""
    return dy.nbytes + x.nbytes


def repeat_middle_layer(timeline: Timeline, layers: int, num_groups: int) -> Timeline:
    """The timeline of `layers` equal decoder layers, from the recording of three: the middle one, repeated.

    The groups of copy c of the middle layer (c = 0 the recorded one) are numbered group + c * num_groups.
    """
    where, groups, segments = [], [], []
    names: list[tuple[str, int]] = []
    for number, (name, layer) in enumerate(timeline.names):
        events = np.flatnonzero(timeline.segment == number)
        middle = name in ("forward", "backward") and layer == 1
        copies = range(layers - 2) if middle else range(1)
        for copy in reversed(copies) if name == "backward" else copies:
            where.append(events)
            groups.append(np.where(timeline.kind[events] == USE, timeline.group[events] + copy * num_groups, -1))
            segments.append(np.full(len(events), len(names)))
            names.append((name, layers - 1 if layer == 2 else layer + copy))
    order = np.concatenate(where)
    return Timeline(
        timeline.delta[order], timeline.kind[order], np.concatenate(groups), np.concatenate(segments), names
    )
