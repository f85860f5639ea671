"""One training step of a recipe on fake tensors: shapes and dtypes, no storage, the code that really trains.

The model is given three decoder layers, and the recording of the middle one is repeated (tests/planning proves that
this equals the recording of all layers).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroada.adapter import NeuroAdaLinear
from neuroada.adapter.experts import NeuroAdaExpertsWeight
from neuroada.config.recipe import Recipe
from neuroada.engines import adamw, trainable_parameters
from neuroada.hf.attention_sinks import has_sinks
from neuroada.hf.loading import DTYPES
from neuroada.methods import Method, make_method
from neuroada.objectives import Objective, make_objective
from neuroada.objectives.micro_batch import MicroBatch
from neuroada.planning.layers import decoder_layers
from neuroada.planning.meta_model import on_meta
from neuroada.planning.timeline import GRADIENTS, Recorder, Timeline, repeat_middle_layer
from neuroada.quantised import QuantisedLinear

RECORDED_LAYERS = 3


@dataclass(frozen=True)
class Parameter:
    """A parameter, or a mask. kind: weights, idx, delta, mask or classifier; layer: None outside the layers.

    rows: of its first dimension, along which it is sharded; where `experts`, of one row each.
    """

    kind: str
    numel: int
    itemsize: int
    rows: int
    trained: bool
    layer: int | None
    entries: int  # of the matrix; of a quantised one more than its bytes
    experts: bool = False  # a token meets only the few that its router chose

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Step:
    """What a step of one micro batch costs: every parameter of the model, and what is alive besides.

    accumulating: earlier micro batches left gradients, alive from the start; the timeline has only those it made new.
    trainable: how many trainable parameters, by the method's own count.
    whole_indices: bytes that every rank holds beside its share of the parameters.
    groups: the parameters gathered together by ZeRO-3 when a module runs; a timeline's group g is
    groups[g % len(groups)].
    """

    params: list[Parameter]
    timeline: Timeline
    groups: list[list[Parameter]]
    accumulating: bool
    trainable: int
    whole_indices: int


def record_step(recipe: Recipe, config: Any, accumulating: bool, method: Method | None = None) -> Step:
    """Record a step of one micro batch of `recipe`, at its longest: every sequence of train.max_length tokens, all of
    them scored.

    config: the model's transformers configuration. accumulating: gradients of earlier micro batches are alive.
    method: another than the recipe's.
    """
    method, objective = method or make_method(recipe), make_objective(recipe)
    layers = config.num_hidden_layers
    with warnings.catch_warnings(action="ignore"):  # libraries' advice to trainers would bury the plan
        full = on_meta(config, recipe, method, objective)
        params = [param for _, group in _owners(full, method) for param in group]
        recorded = RECORDED_LAYERS if layers > RECORDED_LAYERS and _alike(config, params) else layers
        model = on_meta(config, recipe, method, objective, recorded)
        timeline, groups = _record(recipe, model, method, objective, accumulating)
    if recorded < layers:
        timeline = repeat_middle_layer(timeline, layers, len(groups))
    return Step(params, timeline, groups, accumulating, method.trainable(full), method.whole_indices(full))


def _alike(config: Any, params: list[Parameter]) -> bool:
    """Whether every layer computes what the first ones do; a mixture's first may have no experts."""
    kinds = set(getattr(config, "layer_types", None) or ["same"])
    same = len(kinds) == 1 or has_sinks(config)  # whose layers differ in what they see alone, which a plan leaves out
    by_layer: dict[int, list[Parameter]] = {}
    for param in params:
        if param.layer is not None:
            by_layer.setdefault(param.layer, []).append(replace(param, layer=0))
    return same and all(found == by_layer[0] for found in by_layer.values())


def _record(
    recipe: Recipe, model: nn.Module, method: Method, objective: Objective, accumulating: bool
) -> tuple[Timeline, list[list[Parameter]]]:
    if recipe.train.activation_checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    compute = DTYPES[recipe.train.dtype]
    method.prepare(model, torch.device("cpu"), compute)
    batch = objective.longest_batch(cast(Any, model).config.vocab_size)
    # Constants that the model's code makes of Python numbers are real: let them in.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _fake(model)
        batch = batch.map(mode.from_tensor)
        optimizer = adamw(model, recipe)
        for _, param in trainable_parameters(model):
            param.grad = torch.zeros_like(param)
        optimizer.step()  # makes AdamW's state
        optimizer.zero_grad()
        known = [value for state in optimizer.state.values() for value in state.values()]
        if accumulating:
            for _, param in trainable_parameters(model):
                param.grad = torch.zeros_like(param)
                known.append(param.grad)
        recorder = Recorder([*model.parameters(), *model.buffers(), *known])
        groups = watch(model, method, recorder)
        with recorder:
            run_step(model, objective, batch, optimizer, recorder)
        return recorder.timeline(), groups


def run_step(
    model: nn.Module, objective: Objective, batch: MicroBatch, optimizer: torch.optim.Optimizer, recorder: Recorder
) -> None:
    """Forward, backward and AdamW, as the training loop runs them."""
    for tensor in (*batch.inputs.values(), batch.targets):
        recorder.add(tensor)
    loss = objective.summed_loss(model, batch)
    recorder.end_forward()
    loss.backward()
    del loss
    recorder.mark("optimizer")
    optimizer.step()
    optimizer.zero_grad()


def watch(model: nn.Module, method: Method, recorder: Recorder) -> list[list[Parameter]]:
    """Have the recorder told where layers begin, what modules need their parameters when, and what gradients are."""
    groups: list[list[Parameter]] = []

    def note_use(group: int) -> Any:
        def forward(module: nn.Module, args: Any) -> None:
            recorder.use(group)

        def forward_done(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda grad: recorder.use(group))

        return forward, forward_done

    for module, params in _owners(model, method):
        before, after = note_use(len(groups))
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        groups.append(params)

    layers = decoder_layers(model)
    for number, layer in enumerate(layers):

        def begin(module: nn.Module, args: Any, number: int = number) -> None:
            if not recorder.forward_end:  # else recomputed by activation checkpointing
                recorder.mark("forward", number)

        def end(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
            if recorder.forward_end:
                return
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:  # nothing trains below a classifier alone
                output.register_hook(lambda grad: recorder.mark("backward", number))
            if number == len(layers) - 1:
                recorder.mark("head")

        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end)

    for _, param in trainable_parameters(model):
        param.register_post_accumulate_grad_hook(lambda param: recorder.add(param.grad, GRADIENTS))
    return groups


def _owners(model: nn.Module, method: Method) -> Iterator[tuple[nn.Module, list[Parameter]]]:
    """The modules that run on parameters of their own, and these; an adapted Linear owns its weight and its adapter.

    A tied weight belongs to the first of its modules.
    """
    layer_of = {id(module): number for number, layer in enumerate(decoder_layers(model)) for module in layer.modules()}
    names = {id(param): name for name, param in model.named_parameters()}
    entries = {
        id(module.packed): module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, QuantisedLinear)
    }
    seen: set[int] = set()
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        whole = isinstance(module, NeuroAdaLinear)
        if whole:
            inside.update(id(child) for child in module.modules())
        params = []
        experts = isinstance(module, NeuroAdaExpertsWeight) or hasattr(module, "num_experts")
        for param in module.parameters(recurse=whole):
            if id(param) not in seen:
                seen.add(id(param))
                shape = (_kind(names[id(param)], method), param.numel(), param.itemsize, len(param))
                holds = entries.get(id(param), param.numel())
                layer = layer_of.get(id(module))
                params.append(Parameter(*shape, param.requires_grad, layer, holds, experts and param.ndim == 3))
        if params:
            yield module, params


def _kind(name: str, method: Method) -> str:
    return "classifier" if ".modules_to_save." in name else method.kind(name)


def _fake(model: nn.Module) -> None:
    """Replace every tensor of a meta model by a fake one on the CPU; call under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), param.requires_grad)
                module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, NeuroAdaLinear):
            module.unselected.clear()  # as if connections had been chosen
