"""PEFT's Super-Tuning: the (1 - adapter.sparsity) largest entries of a weight, whatever their row."""

from collections.abc import Callable
from typing import Any

from peft import SupertuningConfig

from neuroada.methods.unsharded_peft_method import UnshardedPeftMethod


class SuperTuning(UnshardedPeftMethod):
    name = "supertuning"
    sizes = "sparsity"
    prefix = "supertuning_"
    values = ".supertuning_values"
    unsupported = {  # noqa: RUF012 (a constant of the class)
        "zero3": "PEFT's Super-Tuning reads the base weight without gathering its partitions"
    }

    def match(self, budget: int, count: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
        """A share of each weight, to six digits: what trains at 0 and at 0.5 says what a share trains."""
        everything, half = (count({self.sizes: sparsity}) for sparsity in (0.0, 0.5))
        entries = 2 * (everything - half)  # without a classifier, which trains whole
        share = (budget - (everything - entries)) / entries
        return {self.sizes: round(1 - min(1.0, max(1e-6, share)), 6)}

    def describe(self) -> str:
        return f"Super-Tuning, sparsity {self.adapter.sparsity}"

    def config(self, task_type: str) -> SupertuningConfig:
        return SupertuningConfig(sparsity=self.adapter.sparsity, target_modules=self.targets, task_type=task_type)
