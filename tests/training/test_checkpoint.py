"""Checkpoints that are damaged, cut or of another run; and a loss that is not finite."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError
from neuroada.training.checkpoint import find_checkpoint
from neuroada.training.trainer import train


@pytest.fixture(scope="module")
def fields(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = tmp_path_factory.mktemp("data")
    return [f"model={tiny}", f"data_dir={data}", "engine.name=single", "train.max_steps=4", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def finished(fields: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}"]))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, with checkpoints at steps 2 and 4."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, alter, Path.unlink])
def test_damage_is_found_and_the_newest_whole_one_is_taken(folder: Path, file: str, damage) -> None:
    newest = folder / "checkpoints" / "step-000004"
    assert find_checkpoint(folder) == newest
    if (damage, file) == (alter, "manifest.json"):
        (newest / file).write_text("{")
    else:
        damage(newest / file)
    with pytest.warns(UserWarning, match=rf"step-000004 is passed over: .*{file.split('.')[0]}"):
        assert find_checkpoint(folder) == folder / "checkpoints" / "step-000002"


def test_an_interrupted_save_is_not_seen(folder: Path) -> None:
    root = folder / "checkpoints"
    shutil.copytree(root / "step-000004", root / ".step-000006.partial")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(folder) == root / "step-000004"


def test_a_finished_run_has_nothing_left_to_do(folder: Path, fields: list[str]) -> None:
    before = (folder / "metrics.jsonl").read_text()
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}"]))
    assert (folder / "metrics.jsonl").read_text() == before
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(again[name].equal(tensor) for name, tensor in adapter.items())


def test_an_extended_run_is_the_longer_run(fields: list[str], tmp_path: Path) -> None:
    """To the bit; never back."""
    common = [*fields, "optimizer.schedule=constant", "optimizer.warmup_ratio=0", "train.epochs=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(folder: Path, *more: str) -> None:
        train(load_recipe("tiny_arithmetic", [*common, f"output_dir={folder}", *more]))

    run(whole, "train.max_steps=6")
    run(parts, "train.max_steps=2")
    run(parts, "train.max_steps=6", "train.epochs=2")
    first, second = (
        [
            (line["step"], line["loss"], line["lr"], line["grad_norm"])
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in (whole, parts)
    )
    assert len(first) == 6 and first == second
    assert json.loads((parts / "run.json").read_text())["steps"] == 6
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000006/state.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    with pytest.raises(UserError, match=r"4 steps are asked for, and .* holds a run of 6; ask for at least as many"):
        run(parts, "train.max_steps=4")


@pytest.mark.parametrize("change", ["train.max_steps=8", "train.epochs=9"])
def test_a_run_whose_learning_rates_depend_on_its_length_is_not_extended(folder: Path, fields, change: str) -> None:
    with pytest.raises(
        UserError, match=r"(?s)train.\w+ is \S+ there and \S+ in this run; its learning rates depend .* is extended"
    ):
        train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}", change]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapter.k=5", "adapter.k is 4 there and 5 in this run"),
        ("optimizer.lr=0.5", "optimizer.lr is 0.01 there and 0.5 in this run"),
        ("train.seed=7", "train.seed is 42 there and 7 in this run"),
        ("adapter.selection=random", "adapter.selection is 'magnitude' there and 'random' in this run"),
    ],
)
def test_another_run_s_checkpoint_is_refused_by_the_field(folder: Path, fields, change: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}", change]))


def test_another_base_model_is_refused(folder: Path, fields: list[str], tiny: Path, tmp_path: Path) -> None:
    """The same path with other weights in it."""
    other = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    checkpoint = folder / "checkpoints" / "step-000004"
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert progress["model"] == str(tiny)
    with pytest.raises(UserError, match=r"model is .* there"):
        train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}", f"model={other}"]))
    shutil.rmtree(checkpoint)
    moved = Path(shutil.move(tiny, tmp_path / "away"))
    try:
        shutil.copytree(other, tiny)
        with pytest.raises(UserError, match=r"base is '[0-9a-f]{16}' there and '[0-9a-f]{16}' in this run"):
            train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}"]))
    finally:
        shutil.rmtree(tiny)
        shutil.move(moved, tiny)


def test_resume_never_overwrites_nothing(folder: Path, fields: list[str]) -> None:
    before = (folder / "metrics.jsonl").read_text()
    overrides = [*fields, f"output_dir={folder}", "checkpoint.resume=never"]
    with pytest.raises(UserError, match=r"checkpoint.resume = never: .* already holds checkpoints; choose another"):
        train(load_recipe("tiny_arithmetic", overrides))
    assert (folder / "metrics.jsonl").read_text() == before
    shutil.rmtree(folder / "checkpoints")
    train(load_recipe("tiny_arithmetic", overrides))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(fields: list[str], tmp_path: Path) -> None:
    overrides = [*fields, f"output_dir={tmp_path / 'run'}", "optimizer.lr=1e30", "train.max_steps=6"]
    with pytest.raises(UserError, match=r"step \d: loss is (nan|inf).*Lower optimizer.lr"):
        train(load_recipe("tiny_arithmetic", overrides))
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    for checkpoint in checkpoints:
        for tensor in load_file(checkpoint / "state.safetensors").values():
            assert tensor.isfinite().all()


def test_an_earlier_run_s_scores_are_not_shown_as_a_new_one_s(folder: Path, fields: list[str]) -> None:
    """Without its checkpoints the run starts anew, on other data perhaps: its report would show the old accuracy."""
    entry = {"n": 9, "published": 0.987, "sound": 0.987, "baseline": 0.0}
    (folder / "results.json").write_text(json.dumps({"tasks": {"arithmetic": entry}}))
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"holds the scores of an earlier run .* choose another output_dir"):
        train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}"]))
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("part", ["adapter", "checkpoints", "predictions"])
def test_a_part_that_cannot_be_written_is_told_before_the_first_step(
    folder: Path, fields: list[str], part: str
) -> None:
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / part, ignore_errors=True)
    (folder / part).write_text("a file")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=rf"output_dir = .*/{part}/\.preflight: File exists") as told:
        train(load_recipe("tiny_arithmetic", [*fields, f"output_dir={folder}"]))
    assert "\n" not in str(told.value)
    assert not (folder / "metrics.jsonl").exists()
