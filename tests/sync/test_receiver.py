"""What a receiver holds after each message: the trainer's bits, the base's bits, or what it held before."""

from pathlib import Path

import pytest
import torch
from sync_models import bits, change, logits, plain, same_bits, senders, tuned

from neuroada.errors import UserError
from neuroada.sync import ModelWeights, Pipe, Receiver, Sender, SyncError, WrongBase, follow, publish


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_logits_are_the_trainer_s_and_the_base_comes_back(base_folder: Path, dtype: torch.dtype, parts: int) -> None:
    trainer, engine = tuned(base_folder, dtype), plain(base_folder, dtype)
    base = bits(engine)
    receiver, ranks = Receiver(ModelWeights(engine)), senders(trainer, parts)
    for step in range(4):
        change(trainer, step)
        done = [receiver.apply(sender.message()) for sender in ranks]
        assert done == [False] * (parts - 1) + [True]
        assert receiver.version == step
        assert logits(engine).equal(logits(trainer))
    assert not same_bits(bits(engine), base)
    receiver.restore()
    assert same_bits(bits(engine), base)
    assert receiver.version is None


def test_a_values_message_is_two_bytes_a_connection(base_folder: Path) -> None:
    sender = Sender(tuned(base_folder, torch.bfloat16, k=8))
    sender.message()
    connections = sum(module.shape[0] * module.k for module in _modules(sender))
    data = sender.message()
    head = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - head == 2 * connections


def _modules(sender: Sender):
    from neuroada.sync.message import decode

    return decode(sender.message(state=True)).header.modules.values()


def test_one_message_swaps_adapters(base_folder: Path) -> None:
    """Whose connections differ and overlap; the base is the same under both."""
    trainer, engine = tuned(base_folder), plain(base_folder)
    trainer.add_adapter("other", trainer.peft_config["default"].__class__(k=5, target_modules=["q_proj", "down_proj"]))
    base, receiver, sender = bits(engine), Receiver(ModelWeights(engine)), Sender(trainer)
    for adapter in ("default", "other", "default"):
        change(trainer, 1, adapter)
        sender.use(adapter)
        trainer.set_adapter(adapter)
        assert receiver.apply(sender.message())
        assert receiver.adapter == adapter
        assert logits(engine).equal(logits(trainer))
    receiver.restore()
    assert same_bits(bits(engine), base)


def test_a_wrong_base_is_refused_and_nothing_changes(base_folder: Path) -> None:
    trainer, engine = tuned(base_folder), plain(base_folder)
    change(trainer, 0)
    receiver, sender = Receiver(ModelWeights(engine)), Sender(trainer)
    receiver.apply(sender.message())
    held = bits(engine)
    weight = trainer.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight
    weight.data[0] = torch.nextafter(weight.data[0], torch.tensor(9.0))
    with pytest.raises(WrongBase, match=r"layers\.1\.mlp\.up_proj.*other base"):
        receiver.apply(_as_stream(Sender(trainer), sender).message())
    assert same_bits(bits(engine), held)
    assert receiver.version == 0


def _as_stream(new: Sender, old: Sender) -> Sender:
    new.stream, new.version = old.stream, old.version
    return new


@pytest.mark.parametrize("other", ["dtype", "shape", "name"])
def test_another_model_is_refused_in_one_line(base_folder: Path, other: str) -> None:
    message = Sender(tuned(base_folder)).message()
    engine = plain(base_folder, torch.bfloat16 if other == "dtype" else torch.float32)
    layer = engine.model.layers[0]
    if other == "shape":
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data[:-1].contiguous()
    if other == "name":
        layer.mlp.renamed = layer.mlp.up_proj
        del layer.mlp.up_proj
    before = bits(engine)
    with pytest.raises(WrongBase) as error:
        Receiver(ModelWeights(engine)).apply(message)
    assert "\n" not in str(error.value)
    assert same_bits(bits(engine), before)


def test_a_restarted_receiver_asks_for_the_state_and_gets_it(base_folder: Path) -> None:
    trainer, pipe = tuned(base_folder), Pipe()
    sender, receiver = Sender(trainer), Receiver(ModelWeights(plain(base_folder)))
    for step in range(3):
        change(trainer, step)
        publish(sender, pipe)
        assert follow(receiver, pipe) == step
    engine = plain(base_folder)  # the old one is gone
    receiver = Receiver(ModelWeights(engine))
    publish(sender, pipe)
    assert follow(receiver, pipe) is None
    change(trainer, 9)
    publish(sender, pipe)
    assert follow(receiver, pipe) == 4
    assert logits(engine).equal(logits(trainer))


def test_another_sender_is_followed_only_after_restore(base_folder: Path) -> None:
    trainer, engine, pipe = tuned(base_folder), plain(base_folder), Pipe()
    receiver = Receiver(ModelWeights(engine))
    publish(Sender(trainer), pipe)
    follow(receiver, pipe)
    publish(Sender(trainer), pipe)
    with pytest.raises(SyncError, match="another sender"):
        follow(receiver, pipe)
    receiver.restore()
    change(trainer, 2)
    publish(Sender(trainer), pipe)
    assert follow(receiver, pipe) == 0
    assert logits(engine).equal(logits(trainer))


def test_what_else_is_trained_is_refused(base_folder: Path) -> None:
    model = tuned(base_folder, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"lm_head.*is trained too"):
        Sender(model)
    with pytest.raises(UserError, match="no such NeuroAda adapter"):
        Sender(tuned(base_folder), "absent")


def test_a_write_that_fails_half_way_needs_a_state(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, engine = tuned(base_folder), plain(base_folder)
    weights = ModelWeights(engine)
    receiver, sender = Receiver(weights), Sender(trainer)
    receiver.apply(sender.message())
    calls = []

    def failing(weight, flat, values):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr("neuroada.sync.weights.write", failing)
        with pytest.raises(RuntimeError):
            receiver.apply(sender.message())
    assert receiver.version is None
    with pytest.raises(SyncError, match="no state is there") as error:
        receiver.apply(sender.message())
    assert error.value.needs == "state"
    change(trainer, 3)
    receiver.apply(sender.message(state=True))
    assert logits(engine).equal(logits(trainer))


def test_a_model_that_was_moved_or_replaced_is_not_changed_unseen(base_folder: Path) -> None:
    trainer, engine = tuned(base_folder), plain(base_folder)
    receiver, sender = Receiver(ModelWeights(engine)), Sender(trainer)
    receiver.apply(sender.message())
    layer = engine.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.clone()  # as `model.to` does
    change(trainer, 1)
    receiver.apply(sender.message())
    assert logits(engine).equal(logits(trainer))
    layer.weight = torch.nn.Parameter(layer.weight.data)
    with pytest.raises(WrongBase, match=r"up_proj.*make a new receiver"):
        receiver.apply(sender.message())
    assert receiver.version == 1
