"""What a run says before its first step."""

from pathlib import Path

import pytest
import torch

from neuroada.config.recipe import load_recipe
from neuroada.training.trainer import train


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run takes the GPU")
@pytest.mark.parametrize(
    ("instructions", "dtype", "told"), [("AVX2", "bf16", 1), ("AVX2", "fp32", 0), ("AVX512", "bf16", 0)]
)
def test_bf16_on_a_cpu_without_its_instructions(
    instructions: str,
    dtype: str,
    told: int,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There a product of matrices takes 5 to 8 times as long as in fp32 (torch 2.13), and nothing else would tell."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    places = [f"model={tiny}", f"output_dir={tmp_path / 'run'}", f"data_dir={tmp_path / 'data'}", "engine.name=single"]
    train(load_recipe("tiny_arithmetic", [*places, "train.max_steps=1", f"train.dtype={dtype}"]))
    assert capsys.readouterr().out.count("several times slower than train.dtype=fp32") == told
