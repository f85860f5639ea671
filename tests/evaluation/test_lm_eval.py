"""lm-evaluation-harness, by its own command line: an exported checkpoint, and a base model with the adapter."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness_task import TASK
from safetensors.torch import load_file

from neuroada import NeuroAdaConfig
from neuroada.sources.tiny import make_tiny

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-dev.txt")

ROOT = Path(__file__).parents[2]
PLAIN = [sys.executable, "-m", "lm_eval"]  # what the console script `lm_eval` calls
WITH_NEUROADA = [sys.executable, "-c", "import neuroada, lm_eval.__main__ as lm; lm.cli_evaluate()"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, an adapter that changes it much, and the two merged by launch/merge.py."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("lm_eval")
    base = make_tiny(root / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), NeuroAdaConfig(k=8, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        if "neuroada_delta" in name:
            param.data.normal_(0.0, 0.5)
    model.save_pretrained(str(root / "adapter"))
    merge = [sys.executable, "launch/merge.py", "--adapter", str(root / "adapter"), "--out", str(root / "merged")]
    subprocess.run(merge, cwd=ROOT, check=True)
    return {name: root / name for name in ("base", "adapter", "merged")}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task of 40 sums with four answers to choose from."""
    folder = tmp_path_factory.mktemp("task")
    draw = random.Random(0)
    rows = []
    for _ in range(40):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        choices = [str(a + b + shift) for shift in draw.sample([0, 1, 2, 3], 4)]
        rows.append({"question": f"{a} + {b} =", "choices": choices, "answer": choices.index(str(a + b))})
    (folder / "test.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=folder / "test.json", metrics="[{metric: acc}]"))
    return folder


def score(command: list[str], model_args: str, task: Path, out: Path) -> tuple[float, torch.Tensor]:
    """lm_eval's accuracy, and the log-likelihood of every choice of every question, [40, 4]."""
    options = {"model": "hf", "model_args": f"{model_args},dtype=float32", "tasks": "sums", "include_path": task,
               "device": "cpu", "batch_size": 8, "output_path": out}  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out.parent / "cache")}
    done = subprocess.run(
        [*command, *given, "--log_samples"], env={**os.environ, **offline}, cwd=out.parent,
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_sums_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    likelihoods = [[float(response[0]) for response in line["filtered_resps"]] for line in lines]
    return json.loads(results.read_text())["results"]["sums"]["acc,none"], torch.tensor(likelihoods)


def test_merged_and_adapter_score_alike(models: dict[str, Path], task: Path, tmp_path: Path) -> None:
    merged, found = score(PLAIN, f"pretrained={models['merged']}", task, tmp_path / "merged")
    both = f"pretrained={models['base']},peft={models['adapter']}"
    adapted, same = score(WITH_NEUROADA, both, task, tmp_path / "adapter")
    before, after = (load_file(models[name] / "model.safetensors") for name in ("base", "merged"))
    assert found.shape == (40, 4)
    assert merged == adapted
    torch.testing.assert_close(same, found, rtol=1e-5, atol=1e-5)  # the product of a few tokens sums in another order
    assert any(not after[name].equal(before[name]) for name in before)  # the adapter does count
