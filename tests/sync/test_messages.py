"""The bytes of a message, and what becomes of any message that is lost, doubled, reordered, cut or corrupted."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from sync_models import bits, change, plain, same_bits, senders, tuned

from neuroada.sync import ModelWeights, Receiver, SyncError
from neuroada.sync.message import decode, encode

VERSIONS, PARTS, STATE_AGAIN = 5, 2, 3


@dataclass
class History:
    """The messages of five versions from two ranks, version 3 a state again, and the weights of each version."""

    messages: list[bytearray]
    weights: dict[int | None, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def history(base_folder: Path) -> History:
    trainer, engine = tuned(base_folder, torch.bfloat16, k=2), plain(base_folder, torch.bfloat16)
    receiver, ranks, found = Receiver(ModelWeights(engine)), senders(trainer, PARTS), History([], {})
    found.weights[None] = bits(engine)
    for version in range(VERSIONS):
        change(trainer, version)
        for sender in ranks:
            found.messages.append(sender.message(state=version == STATE_AGAIN))
            receiver.apply(bytes(found.messages[-1]))
        found.weights[version] = bits(engine)
    return found


def test_a_message_is_a_safetensors_file(history: History) -> None:
    for data in history.messages:
        message, tensors = decode(data), load(bytes(data))
        for name, values in message.values.items():
            assert tensors[f"{name}.values"].equal(values)
        assert encode(message) == data


DISTURBANCES = st.lists(
    st.tuples(
        st.sampled_from(["lose", "double", "swap", "move", "cut", "lengthen", "flip"]),
        st.integers(0, VERSIONS * PARTS - 1),
        st.integers(0, 2**31),
        st.integers(1, 255),
    ),
    max_size=4,
)


def disturb(messages: list[bytes], disturbances: list[tuple[str, int, int, int]]) -> list[bytes]:
    for kind, at, where, byte in disturbances:
        if not messages:
            break
        at %= len(messages)
        message = messages[at]
        match kind:
            case "lose":
                del messages[at]
            case "double":
                messages.insert(where % (len(messages) + 1), message)
            case "swap":
                other = where % len(messages)
                messages[at], messages[other] = messages[other], message
            case "move":
                messages.insert(where % len(messages), messages.pop(at))
            case "cut":
                messages[at] = message[: where % len(message)] if message else message
            case "lengthen":
                messages[at] = message + bytes([byte])
            case "flip" if message:
                where %= len(message)
                messages[at] = message[:where] + bytes([message[where] ^ byte]) + message[where + 1 :]
    return messages


def by_version(messages: list[bytes]) -> list[list[bytes]]:
    """Pairs of neighbours, whichever part came first: the order of ranks within a version means nothing."""
    return [sorted(messages[first : first + PARTS]) for first in range(0, len(messages), PARTS)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(disturbances=DISTURBANCES)
def test_every_disturbance_is_noticed_and_no_weight_is_ever_wrong(history: History, base_folder, disturbances) -> None:
    original = [bytes(message) for message in history.messages]
    delivered = disturb(list(original), disturbances)
    engine = copy.deepcopy(_engine(base_folder))
    receiver, versions, errors = Receiver(ModelWeights(engine)), [], []
    for data in delivered:
        try:
            if receiver.apply(data):
                versions.append(receiver.version)
        except SyncError as error:
            assert "\n" not in str(error)
            errors.append(error)
        assert same_bits(bits(engine), history.weights[receiver.version])
    if by_version(delivered) == by_version(original):
        assert not errors
        assert versions == list(range(VERSIONS))
    else:
        assert errors or versions != list(range(VERSIONS))
    receiver.restore()
    assert same_bits(bits(engine), history.weights[None])


_ENGINES: dict[Path, torch.nn.Module] = {}


def _engine(folder: Path) -> torch.nn.Module:
    if folder not in _ENGINES:
        _ENGINES[folder] = plain(folder, torch.bfloat16)
    return _ENGINES[folder]


def test_every_single_byte_counts(history: History) -> None:
    """Not only those that a random search finds: each byte of a header, and one of each row of values."""
    data = bytes(history.messages[-1])
    start = 8 + int.from_bytes(data[:8], "little")
    for where in [*range(start), *range(start, len(data), 97)]:
        with pytest.raises(SyncError):
            decode(data[:where] + bytes([data[where] ^ 0x20]) + data[where + 1 :])


def test_reading_is_bounded(history: History) -> None:
    data = bytes(history.messages[0])
    with pytest.raises(SyncError, match="at most 1000"):
        decode(data, limit=1000)
    for damaged in (b"", b"\xff" * 8, (1 << 62).to_bytes(8, "little") + data[8:], b'{"a":' * 5000):
        with pytest.raises(SyncError, match="damaged"):
            decode(damaged)


def test_a_future_format_says_so(history: History) -> None:
    import dataclasses

    message = decode(history.messages[2])
    other = dataclasses.replace(message, header=dataclasses.replace(message.header, format=2))
    with pytest.raises(SyncError, match="format 2"):
        decode(encode(other))


def test_a_state_whose_parts_do_not_fit_is_refused(history: History, base_folder: Path) -> None:
    """Two messages that are whole, of a sender that made them wrongly: rows twice, or columns twice."""
    import dataclasses

    first = decode(bytearray(history.messages[0]))
    twice = dataclasses.replace(first, header=dataclasses.replace(first.header, part=1))
    engine = plain(base_folder, torch.bfloat16)
    receiver = Receiver(ModelWeights(engine))
    receiver.apply(encode(first))
    with pytest.raises(SyncError, match="each of its rows once"):
        receiver.apply(encode(twice))
    for idx in first.idx.values():
        idx[:, 2:] = idx[:, :2]
    receiver.apply(encode(first))
    with pytest.raises(SyncError, match="indices repeat"):
        receiver.apply(history.messages[1])
    assert same_bits(bits(engine), history.weights[None])
