"""Run an experiment of this folder by PEFT's MetaMathQA comparison: its own run.py, which then knows NeuroAda.

python benchmarks/metamathqa/run.py PEFT EXPERIMENT [options of PEFT's run.py, such as -v]

PEFT: a checkout of huggingface/peft. EXPERIMENT: a folder of experiments/neuroada here, such as llama-3.2-3B-k20.
"""

import os
import runpy
import sys
from pathlib import Path

import neuroada  # noqa: F401 (PEFT knows the method from here on)

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit(str(__doc__))
    checkout, experiment, *options = argv
    theirs = Path(checkout).resolve() / "method_comparison" / "MetaMathQA"
    ours = Path("experiments") / "neuroada" / experiment
    if not (theirs / "run.py").is_file():
        sys.exit(f"error: {checkout}: has no method_comparison/MetaMathQA/run.py; give a checkout of huggingface/peft")
    if not (HERE / ours / "adapter_config.json").is_file():
        known = ", ".join(sorted(folder.name for folder in (HERE / "experiments" / "neuroada").iterdir()))
        sys.exit(f"error: {experiment}: no such experiment; give one of {known}")
    os.chdir(HERE)  # their script wants a path of the form experiments/METHOD/NAME
    sys.path.insert(0, str(theirs))
    sys.argv = [str(theirs / "run.py"), *options, str(ours)]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
