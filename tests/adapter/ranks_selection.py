"""Connections chosen by five passes, which three ranks share.

torchrun --nproc-per-node 3 tests/adapter/ranks_selection.py argument.json
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny_models import layer_indices
from torch import nn

from neuroada import NeuroAdaConfig, select_by_activations, select_by_gradient
from neuroada.errors import UserError

PASSES = 5
CASES = {f"{rule} {case}": (rule, case) for rule in ("gradient", "wanda") for case in ("each", "some")}


class Two(nn.Module):
    """Two layers, whose 20 and 7 neurons three ranks do not divide; a pass may leave the second one out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 7)

    def forward(self, x: torch.Tensor, leave_out: bool) -> torch.Tensor:
        hidden = self.first(x).relu()
        return hidden if leave_out else self.second(hidden)


def choose(rule: str, case: str) -> dict:
    """What this rank ran, and the connections or the error. case: whether each pass runs both layers, or only some."""
    tuned = get_peft_model(Two(), NeuroAdaConfig(k=2, selection=rule, target_modules=["first", "second"]))
    generator = torch.Generator().manual_seed(1)
    ran: list[int] = []

    def run(number: int, x: torch.Tensor) -> None:
        ran.append(number)
        y = tuned(x, leave_out=case == "some" and number == 1)
        if rule == "gradient":
            y.square().sum().backward()

    passes = [partial(run, number, torch.randn(6, 12, generator=generator)) for number in range(PASSES)]
    select = select_by_gradient if rule == "gradient" else select_by_activations
    try:
        select(tuned.base_model, "default", passes)
    except UserError as error:
        return {"ran": ran, "error": str(error)}
    layers = tuned.base_model.adapted_layers("default")
    return {"ran": ran, "chosen": {layer.name: layer_indices(layer).tolist() for layer in layers}}


def main() -> None:
    out = Path(json.loads(Path(sys.argv[1]).read_text())["out"])
    dist.init_process_group("gloo")
    found = {name: choose(*case) for name, case in CASES.items()}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
