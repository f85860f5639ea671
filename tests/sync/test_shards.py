"""Receivers that hold tensor-parallel shards: together they are the whole model's bits."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import run_ranks
from safetensors import safe_open
from sync_models import change, logits, plain, senders, tuned

from neuroada.errors import UserError
from neuroada.sync import FolderTransport, ModelWeights, Receiver, Sender, Shard, follow, publish

ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def shards(rank: int, size: int) -> dict[str, Shard]:
    return {**{name: Shard(0, rank, size) for name in ROWS}, **{name: Shard(1, rank, size) for name in COLUMNS}}


def shard_of(folder: Path, dtype: torch.dtype, rank: int, size: int) -> torch.nn.Module:
    """The model with this rank's blocks of its weights, as a tensor-parallel engine stores them."""
    model = plain(folder, dtype)
    for name, module in model.named_modules():
        for end, shard in shards(rank, size).items():
            if name.endswith(end):
                module.weight.data = module.weight.data.chunk(size, shard.dim)[rank].contiguous()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_together_are_the_whole(base_folder: Path, size: int, dtype: torch.dtype) -> None:
    trainer, whole = tuned(base_folder, dtype), plain(base_folder, dtype)
    parts = [shard_of(base_folder, dtype, rank, size) for rank in range(size)]
    bases = [{name: param.clone() for name, param in part.named_parameters()} for part in parts]
    receivers = [Receiver(ModelWeights(part, shards(rank, size))) for rank, part in enumerate(parts)]
    ranks, expected = senders(trainer, 3), Receiver(ModelWeights(whole))
    for step in range(3):
        change(trainer, step)
        for sender in ranks:
            message = sender.message()
            for receiver in (expected, *receivers):
                receiver.apply(message)
        for name, param in whole.named_parameters():
            end = name.removesuffix(".weight").rpartition(".")[2]
            dim = next((shard.dim for suffix, shard in shards(0, size).items() if suffix == end), None)
            mine = [part.get_parameter(name) for part in parts]
            assert param.equal(mine[0] if dim is None else torch.cat(mine, dim)), name
    for receiver, part, base in zip(receivers, parts, bases, strict=True):
        receiver.restore()
        assert all(param.equal(base[name]) for name, param in part.named_parameters())


def test_shards_that_do_not_divide_or_are_not_named(base_folder: Path) -> None:
    message = senders(tuned(base_folder), 1)[0].message()
    with pytest.raises(UserError, match="does not divide into 3 shards"):
        Receiver(ModelWeights(plain(base_folder), shards(0, 3))).apply(message)
    with pytest.raises(UserError, match="give `shards`"):
        Receiver(ModelWeights(shard_of(base_folder, torch.float32, 0, 2))).apply(message)


def test_a_model_that_transformers_splits(base_folder: Path, tmp_path: Path) -> None:
    """`tp_plan="auto"` on two ranks; the logits are summed over ranks, in another order than one process's."""
    trainer, expected = tuned(base_folder), plain(base_folder)
    change(trainer, 1)
    sender, folder = Sender(trainer), tmp_path / "messages"
    publish(sender, FolderTransport(folder))
    follow(Receiver(ModelWeights(expected)), FolderTransport(folder))
    argument = {"model": str(base_folder), "folder": str(folder)}
    run_ranks(2, "sync/ranks_tensor_parallel.py", argument, tmp_path)
    for rank in range(2):
        with safe_open(folder / f"{rank}.safetensors", "pt") as file:
            said = json.loads(file.metadata()["found"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert said["version"] == 0
        assert any("q_proj" in name for name in said["split"])
        assert any("down_proj" in name for name in said["split"])
        assert said["base back"]
        for name, param in expected.named_parameters():
            assert tensors[name].equal(param), name
        torch.testing.assert_close(tensors["logits"], logits(trainer))
