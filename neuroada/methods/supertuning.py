"""PEFT's Super-Tuning: the (1 - adapter.sparsity) largest entries of a weight, whatever their row."""

from peft import SupertuningConfig

from neuroada.methods.unsharded_peft_method import UnshardedPeftMethod


class SuperTuning(UnshardedPeftMethod):
    name = "supertuning"
    prefix = "supertuning_"
    values = ".supertuning_values"
    unsupported = {  # noqa: RUF012 (a constant of the class)
        "zero3": "PEFT's Super-Tuning reads the base weight without gathering its partitions"
    }

    def describe(self) -> str:
        return f"Super-Tuning, sparsity {self.adapter.sparsity}"

    def config(self, task_type: str) -> SupertuningConfig:
        return SupertuningConfig(sparsity=self.adapter.sparsity, target_modules=self.targets, task_type=task_type)
