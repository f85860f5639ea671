"""PEFT's own tests of a tuner, run for NeuroAda in SHiRA's place, and for SHiRA; prints the counts of both.

    git clone https://github.com/huggingface/peft && python tests/integrations/peft_suite.py peft/tests

PEFT's files are read where they lie; a rewritten copy runs in a temporary folder. Its tests of pretrained models need
the hub, and are not among these.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

IMPORT = "from neuroada import NeuroAdaConfig\n"
CASE = re.compile(r"NeuroAdaConfig,\s.*?\n    \),", re.DOTALL)
FILES = ["test_custom_models.py"]


def rewrite(text: str) -> str:
    """The same file with NeuroAda's configuration in SHiRA's cases; SHiRA's r = 1, 22 or 30 connections, is k = 5."""
    text = text.replace("    ShiraConfig,\n    Super", "    Super").replace("ShiraConfig", "NeuroAdaConfig")
    text = text.replace("SHiRA", "NeuroAda").replace('"shira"', '"neuroada"')
    text = re.sub(r'("Vanilla MLP \d NeuroAda".*?\}\),?)', lambda case: case[0].replace('"r": 1', '"k": 5'), text)
    text = CASE.sub(lambda case: case[0].replace('"r": 1', '"k": 5').replace("random_seed", "seed"), text)
    text = re.sub(r"(== NeuroAdaConfig:\n\s+config_cls = partial\(config_cls, )r=1", r"\1k=5", text)
    return re.sub(r"(?m)^from peft import \(", IMPORT + "from peft import (", text, count=1)


def run(tests: Path, method: str, arguments: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tests"
        copy.mkdir()
        for path in tests.glob("*.py"):
            text = path.read_text()
            (copy / path.name).write_text(rewrite(text) if method == "NeuroAda" and path.name in FILES else text)
        if find_spec("diffusers") is None:  # imported by the common file, used by tests of its own
            (copy / "diffusers.py").write_text("StableDiffusionPipeline = None\n")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "-k",
            method,
        ]
        path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, *arguments, *FILES],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    return done.stdout


def main() -> None:
    tests = Path(sys.argv[1]).resolve()
    for method in ("NeuroAda", "SHiRA"):
        output = run(tests, method, sys.argv[2:])
        print(output if sys.argv[2:] else "", f"{method}: {output.splitlines()[-1]}", sep="\n")


if __name__ == "__main__":
    main()
