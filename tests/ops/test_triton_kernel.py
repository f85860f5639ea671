"""The Triton kernel computes the sampled gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_equals_the_reference_under_the_interpreter():
    pytest.importorskip("triton", reason="triton comes with torch's CUDA build, or from requirements-dev.txt")
    script = Path(__file__).with_name("interpreted_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr
