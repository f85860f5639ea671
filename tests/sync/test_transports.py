"""Messages through a folder and over torch.distributed, and receivers that were away."""

import json
from pathlib import Path

import pytest
from distributed_runs import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from sync_models import bits, change, logits, plain, same_bits, senders, tuned

from neuroada.sync import FolderTransport, ModelWeights, Receiver, Sender, SyncError, follow, publish


def test_folder_with_two_receivers_one_of_them_killed(base_folder: Path, tmp_path: Path) -> None:
    """The one that stays follows every version; the other comes back after its files are gone, and asks."""
    trainer, engine = tuned(base_folder), plain(base_folder)
    sender, out = Sender(trainer), FolderTransport(tmp_path, keep=3)
    receiver, transport = Receiver(ModelWeights(engine)), FolderTransport(tmp_path)
    for version in range(6):
        change(trainer, version)
        publish(sender, out)
        assert follow(receiver, transport) == version
    assert len(list(tmp_path.iterdir())) == 3

    restarted, back = plain(base_folder), FolderTransport(tmp_path)
    newcomer = Receiver(ModelWeights(restarted))
    assert follow(newcomer, back) is None  # three values messages, and no state
    change(trainer, 6)
    publish(sender, out)
    assert follow(newcomer, back) == follow(receiver, transport) == 6
    assert logits(restarted).equal(logits(trainer))
    assert same_bits(bits(restarted), bits(engine))

    late = Receiver(ModelWeights(plain(base_folder)))  # the state is still there: no question
    publish(sender, out)
    assert follow(late, FolderTransport(tmp_path)) == 7
    assert not list(tmp_path.glob("request-*"))


def test_a_version_is_read_when_all_ranks_have_written(base_folder: Path, tmp_path: Path) -> None:
    ranks = senders(tuned(base_folder), 2)
    out, receiver = FolderTransport(tmp_path), Receiver(ModelWeights(plain(base_folder)))
    transport = FolderTransport(tmp_path)
    out.send(ranks[1].message())
    assert follow(receiver, transport) is None
    assert not list(tmp_path.glob("request-*"))
    out.send(ranks[0].message())
    assert follow(receiver, transport) == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "lost"])
def test_a_damaged_file_is_refused_and_mended_by_a_state(base_folder: Path, tmp_path: Path, damage: str) -> None:
    trainer, engine = tuned(base_folder), plain(base_folder)
    sender, transport = Sender(trainer), FolderTransport(tmp_path)
    receiver = Receiver(ModelWeights(engine))
    publish(sender, transport)
    follow(receiver, transport)
    publish(sender, transport)
    (path,) = tmp_path.glob("*.values.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "lost":
        path.unlink()
        publish(sender, transport)
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    assert follow(receiver, transport) == 0
    change(trainer, 5)
    publish(sender, transport)
    assert follow(receiver, transport) == sender.version
    assert logits(engine).equal(logits(trainer))


def test_a_trainer_started_again_in_the_same_folder(base_folder: Path, tmp_path: Path) -> None:
    """Its first message removes the files of the one before; a receiver says so, and follows it after restore()."""
    trainer, engine = tuned(base_folder), plain(base_folder)
    receiver, transport = Receiver(ModelWeights(engine)), FolderTransport(tmp_path)
    first = Sender(trainer)
    for _ in range(3):
        publish(first, FolderTransport(tmp_path))
    assert follow(receiver, transport) == 2
    second = Sender(trainer)
    publish(second, FolderTransport(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with pytest.raises(SyncError, match=r"another sender.*restore"):
        follow(receiver, transport)
    receiver.restore()
    change(trainer, 1)
    publish(second, FolderTransport(tmp_path))  # values: the receiver missed their state, and asks
    assert follow(receiver, transport) is None
    publish(second, FolderTransport(tmp_path))
    assert follow(receiver, transport) == 2
    assert logits(engine).equal(logits(trainer))


def test_a_file_longer_than_the_limit_is_not_read_whole(base_folder: Path, tmp_path: Path) -> None:
    publish(Sender(tuned(base_folder)), FolderTransport(tmp_path))
    transport = FolderTransport(tmp_path, limit=100)
    (data,) = transport.receive()
    assert len(data) == 101
    with pytest.raises(SyncError, match="at most 100"):
        Receiver(ModelWeights(plain(base_folder)), limit=100).apply(data)


def test_over_torch_distributed(base_folder: Path, tmp_path: Path) -> None:
    """Two trainer ranks, two receivers, one of which loses its state in the middle."""
    said = run_ranks(4, "sync/ranks_transport.py", {"model": str(base_folder), "out": str(tmp_path)}, tmp_path)
    assert said is not None
    for rank, expected in ((2, [0, 1, 2, 3, 4]), (3, [0, 1, None, 3, 4])):
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["versions"]) == expected
        found = load_file(tmp_path / f"{rank}.safetensors")
        for version in (0, 1, 3, 4):
            trainer = load_file(tmp_path / f"trainer-{version}.safetensors")["logits"]
            assert found[f"logits {version}"].equal(trainer)
