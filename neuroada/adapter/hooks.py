"""A module's hooks around a computation that stands in for its own forward.

A layer that computes with its base layer's weight never calls the base layer; whoever hooked it (accelerate, to bring
an offloaded weight to the device; a probe of activations) still counts on it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.hooks import BackwardHook

Forward = Callable[..., torch.Tensor]


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )


def call_with_hooks(module: nn.Module, forward: Forward, *args: torch.Tensor) -> torch.Tensor:
    """`module(*args)`, with `forward` in place of the module's own: in the order of torch's `nn.Module.__call__`."""
    for key, hook in [*module._forward_pre_hooks.items()]:
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, {})
            args = args if changed is None else changed[0]
        elif (changed := hook(module, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    backward = None
    if module._backward_hooks or module._backward_pre_hooks:
        full, _ = module._get_backward_hooks()
        backward = BackwardHook(module, full, module._get_backward_pre_hooks())
        args = backward.setup_input_hook(args)
    y = _through_accelerate(module, forward, *args)
    for key, hook in [*module._forward_hooks.items()]:
        changed = hook(module, args, {}, y) if key in module._forward_hooks_with_kwargs else hook(module, args, y)
        y = y if changed is None else changed
    return y if backward is None else backward.setup_output_hook(y)


def _through_accelerate(module: nn.Module, forward: Forward, *args: torch.Tensor) -> torch.Tensor:
    """accelerate hooks a module by replacing its forward, so torch's hooks surround it."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return forward(*args)
    args, _ = hook.pre_forward(module, *args)
    return hook.post_forward(module, forward(*args))


@contextmanager
def brought(*modules: nn.Module) -> Iterator[None]:
    """While the block runs, what accelerate offloaded of these modules' parameters is on its device.

    For modules that are read and not called: the dictionaries of an adapter's parameters, and a weight that is only
    looked at.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = module.__dict__.get("_hf_hook")
            if hook is not None and any(param is not None and param.is_meta for param in module._parameters.values()):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield
