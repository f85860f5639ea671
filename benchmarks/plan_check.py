"""Plans against real runs: the bytes alive at the peak of a real step, counted on CPU, beside what the plan says.

python benchmarks/plan_check.py --model models/smollm2-135m --ranks 1 2 4 [--base nf4]

Every engine really runs: each rank counts the storages alive before, during and after its second step. Prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

STRATEGIES = ("zero1", "zero2", "zero3", "fsdp2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--base", choices=("nf4", "int8", "fp8"), help="over a base stored so")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # what this script starts itself with
    args = parser.parse_args()
    if args.rank_of:
        measure(json.loads(args.rank_of))
        return
    print(f"{'strategy':10} ranks  planned GB  counted GB  difference")
    for ranks in args.ranks:
        for strategy in ("single",) if ranks == 1 else args.strategies:
            planned, counted = check(args.model, strategy, ranks, args.checkpointing, args.base)
            difference = 100 * (planned / counted - 1)
            print(
                f"{strategy:10} {ranks:5}  {planned / 1e9:10.3f}  {counted / 1e9:10.3f}  {difference:+9.1f} %",
                flush=True,
            )


def check(
    model: str, strategy: str, ranks: int, checkpointing: bool = False, base: str | None = None
) -> tuple[int, int]:
    """(planned, counted) bytes of rank 0 at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e7,
        }
        if strategy == "zero3":
            options["stage3_param_persistence_threshold"] = 0
        stage = int(strategy[-1]) if strategy.startswith("zero") else 0
        ds_config, result = Path(folder) / "ds.json", Path(folder) / "result.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage, **options}}))
        values = {
            "model": model, "task": "arithmetic", "output_dir": folder, "provenance": "made for a check",
            "adapter": {"k": 20, **targets(model)}, "base": {"model_dtype": base},
            "optimizer": {"lr": 1e-3},
            "train": {"global_batch_size": 2 * ranks, "micro_batch_size": 2, "max_length": 256, "dtype": "bf16",
                      "activation_checkpointing": checkpointing},
            "engine": {"name": "fsdp2" if strategy == "fsdp2" else "deepspeed", "ds_config": str(ds_config)},
        }  # fmt: skip
        command = [sys.executable, __file__, "--rank-of", json.dumps({"recipe": values, "result": str(result)})]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command[1:1] = torchrun
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{strategy} on {ranks}: {done.stderr[-6000:]}")
        return planned(values, strategy, ranks, options), json.loads(result.read_text())


def targets(model: str) -> dict[str, list[str]]:
    """The modules and experts' parameters that are adapted by default."""
    from neuroada.adapter.default_targets import TARGET_MODULES, TARGET_PARAMETERS
    from neuroada.hf.config import find_config

    kind = find_config(model)[0].model_type
    return {"target_modules": TARGET_MODULES[kind], "target_parameters": TARGET_PARAMETERS.get(kind, [])}


def planned(values: dict[str, Any], strategy: str, ranks: int, options: dict[str, Any]) -> int:
    from neuroada.config.recipe import Recipe
    from neuroada.hf.config import find_config
    from neuroada.planning.step import record_step
    from neuroada.planning.strategies import memory

    recipe = Recipe.model_validate(values)
    step = record_step(recipe, find_config(recipe.model)[0], accumulating=False)
    return memory(step, strategy, ranks, options).peak_bytes


def measure(task: dict[str, Any]) -> None:
    """On every rank: take two steps with the recipe's engine; rank 0 writes the peak of the second."""
    import gc

    import torch

    from neuroada.config.recipe import Recipe
    from neuroada.engines import make_engine
    from neuroada.objectives import make_objective
    from neuroada.planning.timeline import Recorder
    from neuroada.training.builder import RecipeModelBuilder

    class RealRecorder(Recorder):
        """Counts real storages; FSDP2 frees and refills its own by resizing them, which no operator shows."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, tuple[Any, int]] = {}

        def add(self, tensor: torch.Tensor, kind: int | None = None) -> None:
            tensor = getattr(tensor, "_local_tensor", tensor)
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                super().add(tensor, kind)
                self.sizes[storage._cdata] = (weakref.ref(storage), storage.nbytes())

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if recipe.engine.name == "fsdp2":
                self.poll()
            return super().__torch_dispatch__(func, types, args, kwargs)

        def poll(self) -> None:
            for key, (ref, known) in self.sizes.items():
                storage = ref()
                if storage is not None and (now := storage.nbytes()) != known:
                    self.sizes[key] = (ref, now)
                    self.events.append((now - known, self.live[key], -1))

        def _drop(self, key: int, nbytes: int) -> None:
            super()._drop(key, self.sizes.pop(key)[1])

    recipe = Recipe.model_validate(task["recipe"])
    engine = make_engine(recipe)
    objective = make_objective(recipe)
    model = engine.load(RecipeModelBuilder.of(recipe))
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    engine.start(model, 1)
    batch = objective.longest_batch(model.config.vocab_size)

    def step() -> None:
        loss = objective.summed_loss(engine.model, batch) / 1000
        engine.backward(loss)
        del loss
        engine.step(1e-4)

    step()
    gc.collect()
    recorder = RealRecorder()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            recorder.add(thing)
    with recorder:
        step()
    live = peak = 0
    for delta, _, _ in recorder.events:
        live += delta
        peak = max(peak, live)
    if engine.rank == 0:
        Path(task["result"]).write_text(json.dumps(peak))


if __name__ == "__main__":
    main()
