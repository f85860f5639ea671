"""The same losses under every engine and world size, and across a move from any to any.

Each source is a run of 8 steps with a checkpoint at step 4. A move takes that checkpoint to another engine or world
size and runs steps 5 to 8 there.
"""

import itertools
import shutil
from pathlib import Path

import pytest
from distributed_runs import TinyRuns, assert_same_curve, losses
from safetensors.torch import load_file

SOURCES = [("single", 1), *itertools.product(("zero1", "zero2", "zero3", "fsdp2"), (1, 2, 3, 4))]
HYBRID, OFFLOADED = "engine.shard_size=2", "engine.cpu_offload=true"
BY_GRADIENT = [("single", 1), ("zero2", 2), ("zero3", 2), ("zero3", 3), ("fsdp2", 3), ("fsdp2", 4)]


@pytest.fixture(scope="module")
def by_gradient(tiny_runs: TinyRuns) -> dict[tuple[str, int], Path]:
    """Runs whose connections the gradient chooses; queued only, so that they share the ranks of `sources`."""
    return {
        source: tiny_runs.add(f"gradient-{source[0]}x{source[1]}", *source, "adapter.selection=gradient")
        for source in BY_GRADIENT
    }


@pytest.fixture(scope="module")
def longer(tiny_runs: TinyRuns) -> dict[tuple[str, int], Path]:
    """Runs of 20 steps; queued only, as above."""
    return {
        source: tiny_runs.add(f"longer-{source[0]}x{source[1]}", *source, "train.max_steps=20")
        for source in SOURCES
        if source == ("single", 1) or source[1] in (2, 4)
    }


@pytest.fixture(scope="module")
def hybrid(tiny_runs: TinyRuns) -> Path:
    """A run of two copies, each sharded over two ranks; queued only, as above."""
    return tiny_runs.add("hybrid", "fsdp2", 4, HYBRID)


@pytest.fixture(scope="module")
def offloaded(tiny_runs: TinyRuns) -> Path:
    """A run whose rows and moments stay in host memory; queued only, as above."""
    return tiny_runs.add("offloaded", "fsdp2", 2, OFFLOADED)


@pytest.fixture(scope="module")
def sources(
    tiny_runs: TinyRuns, by_gradient: dict, longer: dict, hybrid: Path, offloaded: Path
) -> dict[tuple[str, int], Path]:
    """The folder of an uninterrupted run for each engine and world size."""
    found = {source: tiny_runs.add(f"{source[0]}x{source[1]}", *source) for source in SOURCES}
    tiny_runs.run()
    return found


def move(tiny_runs: TinyRuns, source: Path, engine: str, world_size: int, *overrides: str) -> Path:
    """Queue steps 5 to 8 under another engine, from the source's checkpoint at step 4."""
    name = "-".join([source.name, "to", *overrides, f"{engine}x{world_size}"])
    folder = tiny_runs.add(name, engine, world_size, *overrides)
    shutil.copytree(source / "checkpoints" / "step-000004", folder / "checkpoints" / "step-000004")
    shutil.copy(source / "metrics.jsonl", folder)
    return folder


def test_every_engine_and_world_size_learns_the_same(sources: dict[tuple[str, int], Path]) -> None:
    expected = losses(sources["single", 1])
    assert len(expected) == 8
    assert expected[8] < expected[1]
    for source, folder in sources.items():
        assert_same_curve(losses(folder), expected, name=str(source))


def test_the_curves_stay_together_for_20_steps(sources: dict, longer: dict[tuple[str, int], Path]) -> None:
    expected = losses(longer["single", 1])
    assert len(expected) == 20
    for folder in longer.values():
        assert_same_curve(losses(folder), expected)


def test_hybrid_sharding_and_offloading_learn_the_same(sources: dict, hybrid: Path, offloaded: Path) -> None:
    for folder in (hybrid, offloaded):
        assert_same_curve(losses(folder), losses(sources["single", 1]), name=folder.name)


def test_the_adapter_is_the_same_file_from_every_engine(
    sources: dict[tuple[str, int], Path], hybrid: Path, offloaded: Path
) -> None:
    expected = load_file(sources["single", 1] / "adapter" / "adapter_model.safetensors")
    for folder in [*sources.values(), hybrid, offloaded]:
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if name.endswith("neuroada_idx"):
                assert found[name].equal(tensor)  # the selection, to the bit
            else:
                assert found[name].numpy() == pytest.approx(tensor.numpy(), abs=2e-5)


def test_selection_by_gradient_is_the_same_under_sharding(sources: dict, by_gradient: dict) -> None:
    first = by_gradient["single", 1]
    expected = load_file(first / "adapter" / "adapter_model.safetensors")
    by_size = load_file(sources["single", 1] / "adapter" / "adapter_model.safetensors")
    names = [name for name in expected if name.endswith("neuroada_idx")]
    assert not any(expected[name].equal(by_size[name]) for name in names)
    for source, folder in by_gradient.items():
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(found[name].equal(expected[name]) for name in names), source
        assert_same_curve(losses(folder), losses(first))


def test_checkpoints_hold_no_frozen_weight(sources: dict[tuple[str, int], Path]) -> None:
    for (_, ranks), folder in sources.items():
        sizes = sum(path.stat().st_size for path in (folder / "checkpoints" / "step-000008").iterdir())
        trained = sum(tensor.numel() for name, tensor in load_file(
            folder / "adapter" / "adapter_model.safetensors").items() if name.endswith("delta"))  # fmt: skip
        assert sizes <= 12 * trained + ranks * 1_000_000


def check_moves(tiny_runs: TinyRuns, sources: dict, moves: list[tuple[tuple[str, int], tuple[str, int]]]) -> None:
    expected = losses(sources["single", 1])
    folders = [move(tiny_runs, sources[start], *target) for start, target in moves]
    tiny_runs.run()
    for folder in folders:
        assert_same_curve(losses(folder), expected, name=folder.name)


def test_a_run_moves_to_another_engine_and_world_size(tiny_runs: TinyRuns, sources: dict) -> None:
    """Each source once, each target once: the next of the list but five, so that engine and world size both change."""
    check_moves(tiny_runs, sources, list(zip(SOURCES, SOURCES[5:] + SOURCES[:5], strict=True)))


def test_a_run_moves_to_hybrid_sharding_and_from_it(
    tiny_runs: TinyRuns, sources: dict, hybrid: Path, offloaded: Path
) -> None:
    moved = [
        *(move(tiny_runs, sources[source], "fsdp2", 4, HYBRID) for source in (("single", 1), ("zero3", 3))),
        move(tiny_runs, sources["single", 1], "fsdp2", 2, OFFLOADED),
        move(tiny_runs, offloaded, "zero2", 3),
        *(move(tiny_runs, hybrid, *target) for target in (("single", 1), ("zero3", 2), ("fsdp2", 3))),
    ]
    tiny_runs.run()
    for folder in moved:
        assert_same_curve(losses(folder), losses(sources["single", 1]), name=folder.name)


@pytest.mark.long
def test_every_move(tiny_runs: TinyRuns, sources: dict) -> None:
    check_moves(tiny_runs, sources, list(itertools.product(SOURCES, SOURCES)))
