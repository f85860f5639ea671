"""What each rank really stores, what travels, and what a step gives, under several engines; written as JSON by rank.

    torchrun --nproc-per-node 3 tests/sharding/ranks_sharding.py argument.json

argument.json: {"out": folder, "cases": {name: [overrides of tiny_arithmetic]}}
"""

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuroada import sharding
from neuroada.adapter import NeuroAdaLinear
from neuroada.adapter.fingerprint import checksum, fingerprint
from neuroada.cli.command import run
from neuroada.config.recipe import load_recipe
from neuroada.engines import Engine, make_engine
from neuroada.errors import UserError
from neuroada.objectives.cross_entropy import answer_loss
from neuroada.objectives.micro_batch import MicroBatch
from neuroada.ops import pack_indices, unpack_indices
from neuroada.training.builder import RecipeModelBuilder

SEQUENCES, LENGTH = 12, 32


class Traffic(TorchDispatchMode):
    """Bytes of whole tensors gathered and reduced while the block runs, by collective and kind of element."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max((tensor.numel() * tensor.element_size(), str(tensor.dtype)) for tensor in tensors)
            name = "gather" if "gather" in func.__name__ else "reduce"
            self.bytes[f"{name} {largest[1].removeprefix('torch.')}"] += largest[0]
        return func(*args, **(kwargs or {}))


def micro_batches(engine: Engine) -> list[MicroBatch]:
    """This rank's share of a fixed global batch, a sequence each."""
    ids = torch.randint(2, 250, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(3))
    keep = torch.arange(LENGTH - 1)
    return [
        MicroBatch({"input_ids": row[None], "logits_to_keep": keep}, row[None, 1:].contiguous(), LENGTH)
        for row in ids[engine.rank :: engine.world_size]
    ]


def backward(engine: Engine) -> torch.Tensor:
    """All of a step but the optimizer's; this rank's part of the loss."""
    loss = torch.zeros(())
    for micro in micro_batches(engine):
        part = answer_loss(engine.model, micro) / (SEQUENCES * (LENGTH - 1))
        engine.backward(part)
        loss += part.detach()
    return loss


def step(engine: Engine) -> float:
    loss = backward(engine)
    engine.step(lr=1e-2)
    return engine.reduce(loss).item()


def gradient_bytes(model: torch.nn.Module) -> int:
    """Of what this rank holds of the gradients after backward; of ZeRO-1 and ZeRO-2 nothing is told."""
    found = 0
    for param in model.parameters():
        if param.requires_grad and hasattr(param, "ds_id"):
            grad = safe_get_local_grad(param)
        else:
            grad = getattr(param.grad, "_local_tensor", param.grad)
        found += 0 if grad is None else grad.numel() * grad.element_size()
    return found


def stored_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Of what this rank keeps between steps, by kind."""
    found: Counter[str] = Counter()
    for name, param in model.named_parameters():
        kind = next((kind for kind in ("idx", "delta") if f"neuroada_{kind}" in name), "weights")
        kept = sharding.stored(param)
        found[kind] += kept.numel() * kept.element_size()
    return dict(found)


def optimizer_bytes(engine: Any) -> dict[str, int]:
    """AdamW's moments, and the fp32 master copy that DeepSpeed trains in place of the parameters."""
    optimizer = getattr(engine, "optimizer", None) or engine.engine.optimizer.optimizer
    found = Counter(moments=0, master=0)
    for param, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            local = state[key].to_local() if hasattr(state[key], "to_local") else state[key]
            found["moments"] += local.numel() * local.element_size()
        if hasattr(engine, "engine"):
            found["master"] += param.numel() * param.element_size()
    return dict(found)


def evaluate_between(engine: Engine, model: torch.nn.Module) -> None:
    """What must change nothing: forwards without a backward, in eval mode, and a parameter gathered twice."""
    model.eval()
    with torch.no_grad():
        for micro in micro_batches(engine)[:2]:
            answer_loss(engine.model, micro)
    model.train()
    param = next(param for param in model.parameters() if param.requires_grad)
    with sharding.whole(param) as value:
        first = value.clone()
    with sharding.whole(param) as value:
        assert first.equal(value)


def merge_and_unmerge(layers: list[NeuroAdaLinear]) -> dict[str, bool]:
    """Whether merging where the weights lie writes base + delta to the bit, and unmerging the base's own bits."""
    same = {"merged": True, "its base is known": True, "unmerged": True}
    before = fingerprint(layers, "default")
    for layer in layers:
        weight = layer.base.stored
        columns = getattr(layer.base, "transposed", False)  # experts [experts, in, out]: a neuron is a column
        with sharding.whole(weight) as values:
            base = values.transpose(1, 2).clone() if columns else values.clone()
        with sharding.whole(layer.neuroada_idx["default"]) as values:
            idx = unpack_indices(values)
        with sharding.whole(layer.neuroada_delta["default"]) as delta:
            adapted = (base.gather(-1, idx).float() + delta).to(base.dtype)
        expected = base.scatter(-1, idx, adapted)
        layer.merge()
        with sharding.whole(weight) as values:
            values = values.transpose(1, 2) if columns else values
            same["merged"] &= values.equal(expected) and not expected.equal(base)
        known = checksum([(layer.name, pack_indices(idx), base.gather(-1, idx))])
        same["its base is known"] &= fingerprint([layer], "default") == known
        layer.unmerge()
        with sharding.whole(weight) as values:
            same["unmerged"] &= (values.transpose(1, 2) if columns else values).equal(base)
    return same | {"the fingerprint stays": fingerprint(layers, "default") == before}


def refused_of_quantised(base: Any, folder: Path) -> dict[str, str]:
    """What save_pretrained, and dequantize where a rank holds a part, say; empty where they do not refuse."""
    said = {"save_pretrained": "", "dequantize": ""}
    try:
        base.save_pretrained(folder)
    except ValueError as error:
        said["save_pretrained"] = str(error)
    assert not folder.exists()
    if not sharding.is_whole(base.model.layers[0].self_attn.q_proj.base_layer.packed):
        try:
            base.dequantize()
        except UserError as error:
            said["dequantize"] = str(error)
    return said


def main(argv: list[str]) -> None:
    argument = json.loads(Path(argv[0]).read_text())
    for case, overrides in argument["cases"].items():
        recipe = load_recipe("tiny_arithmetic", [*overrides, "train.global_batch_size=12", "train.micro_batch_size=1"])
        engine = make_engine(recipe)
        model = engine.load(RecipeModelBuilder.of(recipe))
        if recipe.train.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        layers = [module for module in model.modules() if isinstance(module, NeuroAdaLinear)]
        found: dict[str, Any] = {"fingerprint": fingerprint(layers, "default"), "before": stored_bytes(model)}
        engine.start(model, recipe.micro_batches(engine.world_size))
        first = backward(engine)
        found["gradients"] = gradient_bytes(model)
        engine.step(lr=1e-2)
        found["losses"] = [engine.reduce(first).item(), step(engine)]
        evaluate_between(engine, model)
        with Traffic() as traffic:
            found["losses"].append(step(engine))
        found["losses"] += [step(engine) for _ in range(argument.get("steps", 5) - 3)]
        found["trained"] = sum(sharding.stored(p).nbytes for p in model.parameters() if p.requires_grad)
        found |= {"stored": stored_bytes(model), "traffic": dict(traffic.bytes), **optimizer_bytes(engine)}
        if layers and layers[0].quantisation is None:
            found["in place"] = merge_and_unmerge(layers)
        elif layers:  # never written
            found["quantised base stays"] = fingerprint(layers, "default") == found["fingerprint"]
            found["refused"] = refused_of_quantised(model.get_base_model(), Path(argument["out"]) / "saved")
        folder = Path(argument["out"]) / case / f"{engine.world_size}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{engine.rank}.json").write_text(json.dumps(found))
        del engine, model, layers
        gc.collect()


if __name__ == "__main__":
    run(main)
