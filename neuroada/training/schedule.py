"""The learning rate of a step."""

from neuroada.config.fields import Optimizer


def lr_at(step: int, steps: int, optimizer: Optimizer) -> float:
    """The rate of step `step` of 0 .. steps - 1: linear warm-up from 0, then linear to 0 (or constant).

    The same numbers as transformers' get_linear_schedule_with_warmup.
    """
    warmup = round(steps * optimizer.warmup_ratio)
    if step < warmup:
        return optimizer.lr * step / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    return optimizer.lr * (steps - step) / max(1, steps - warmup)
