"""What a run says of itself while it runs: metrics.jsonl, TensorBoard, Weights & Biases, and a progress bar."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.files import open_append, write_text
from neuroada.runs.run_folder import read_metrics


def peak_memory_bytes() -> int:
    """Of this process: the allocator's peak on CUDA, the peak resident set elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Metrics:
    """Rank 0's record of a run. A resumed run goes on in the same files, less what was logged past its checkpoint."""

    def __init__(self, recipe: Recipe, steps: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.steps, self.every = steps, recipe.train.log_every
        folder = Path(recipe.output_dir)
        self.file = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= first_step]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        self.stream = open_append(self.file)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.wandb = _start_wandb(recipe) if "wandb" in recipe.report_to else None
        self.bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.file) if self.file.exists() else []

    def log(self, step: int, loss: float, lr: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Record the finished step `step` (from 1), of `tokens` real tokens on all ranks, that took `seconds`."""
        tokens_per_second = tokens / seconds
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{tokens_per_second:,.0f}")
        if step % self.every and step != self.steps:
            return
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.stream.write(json.dumps({"step": step, **values}) + "\n")
        self.stream.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        self.bar.close()
        self.stream.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(recipe: Recipe) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("report_to: wandb is not installed; pip install wandb, or leave it out") from None
    name = Path(recipe.output_dir).name
    return wandb.init(project="neuroada", name=name, id=name, resume="allow", config=recipe.model_dump())
