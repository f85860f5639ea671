"""What a model's folder holds beside its weights, copied with it."""

import shutil
from pathlib import Path

from neuroada.files import check_inside

# Weights, in every format seen on the hub.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}


def companions(folder: Path) -> list[Path]:
    """The model's other files: configuration, generation configuration, index, tokenizer, chat template, licence."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.startswith((".", "adapter_"))
    ]


def copy_companions(folder: Path, out: Path) -> None:
    """UserError: one of them is a link that leads out of the folder."""
    for path in companions(folder):
        check_inside(folder, path)
        shutil.copyfile(path, out / path.name)
