"""The wheel: everything a command needs travels in it, and it works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel's contents, as an installer unpacks them."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--disable-pip-version-check", "--wheel-dir", str(folder), str(ROOT)]  # fmt: skip
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def neuroada(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "neuroada", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_recipes_strategies_and_types_travel(installed: Path) -> None:
    package = installed / "neuroada"
    for folder, kind in (("recipes", "yaml"), ("ds_configs", "json")):
        ours = {path.name for path in (ROOT / folder).glob(f"*.{kind}")}
        assert ours and {path.name for path in (package / "config" / folder).glob(f"*.{kind}")} == ours
    assert (package / "py.typed").is_file() and list((package / "ops").glob("*.cpp"))


def test_it_trains_and_plans_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = "import neuroada; print(neuroada.__file__, neuroada.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout.startswith(str(installed))
    neuroada(installed, tmp_path, "fetch", "model", "tiny")
    neuroada(installed, tmp_path, "train", "--recipe", "tiny_arithmetic", "train.max_steps=2")
    assert (tmp_path / "runs" / "tiny_arithmetic" / "adapter" / "adapter_model.safetensors").is_file()
    assert "zero3 on 8 rank(s)" in neuroada(installed, tmp_path, "plan", "--recipe", "llama13b_math", "--gpus", "8")


def test_help_names_every_command(installed: Path, tmp_path: Path) -> None:
    said = neuroada(installed, tmp_path, "--help")
    for command in (
        "train",
        "evaluate",
        "merge",
        "select",
        "plan",
        "fetch",
        "check-data",
        "compare",
        "report",
        "submit",
    ):
        assert f"  {command} " in said
