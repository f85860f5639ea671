"""The experiments for PEFT's MetaMathQA comparison: PEFT reads them, and the wrapper runs a script as PEFT's is run."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "metamathqa"
EXPERIMENTS = sorted((FOLDER / "experiments" / "neuroada").iterdir())
# As theirs: it finds a module beside it, and reads the experiment from a path of three parts.
SCRIPT = """
import json, sys
from beside_their_script import NAME
from peft import PeftConfig
*options, path = sys.argv[1:]
config = PeftConfig.from_pretrained(path)
print(json.dumps([NAME, type(config).__name__, config.k, options, path]))
"""


@pytest.fixture(scope="module")
def wrapper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metamathqa_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_peft_reads_the_experiment(folder: Path) -> None:
    """And NeuroAda takes every field: on a model with the names of Llama's it trains k of every target's rows."""
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, NeuroAdaConfig)
    hidden, inner, kv, layers = 96, 192, 48, 2
    llama = LlamaConfig(vocab_size=16, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(llama).to(torch.bfloat16), config, autocast_adapter_dtype=True)
    rows = hidden + kv if "q-v" in folder.name else 2 * hidden + 2 * kv + 2 * inner + hidden
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == layers * rows * config.k
    assert all(parameter.dtype == torch.float32 for parameter in trained)

    # The README's number, by Llama-3.2-3B's shapes; the only field of theirs that is changed is the optimizer's.
    rows = 3072 + 1024 if "q-v" in folder.name else 2 * 3072 + 2 * 1024 + 2 * 8192 + 3072
    assert f"| {folder.name} |" in (line := _line(folder.name)) and f"{28 * rows * config.k:,}" in line
    training = json.loads((folder / "training_params.json").read_text())
    assert training.keys() == {"optimizer_kwargs"} and training["optimizer_kwargs"].keys() == {"lr", "weight_decay"}


def _line(experiment: str) -> str:
    return next(line for line in (FOLDER / "README.md").read_text().splitlines() if f"| {experiment} |" in line)


def test_the_wrapper_runs_their_script(
    wrapper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    theirs.mkdir(parents=True)
    (theirs / "run.py").write_text(SCRIPT)
    (theirs / "beside_their_script.py").write_text("NAME = 'theirs'")
    monkeypatch.chdir(tmp_path)  # put back afterwards, as are these two
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    wrapper.main(["peft", "llama-3.2-3B-k20", "-v", "--clean"])
    path = os.path.join("experiments", "neuroada", "llama-3.2-3B-k20")  # noqa: PTH118 (a path as their script has it)
    assert json.loads(capsys.readouterr().out) == ["theirs", "NeuroAdaConfig", 20, ["-v", "--clean"], path]


def test_the_wrapper_says_what_is_missing(wrapper: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give a checkout of huggingface/peft"):
        wrapper.main([str(tmp_path), "llama-3.2-3B-k20"])
    (tmp_path / "method_comparison" / "MetaMathQA").mkdir(parents=True)
    (tmp_path / "method_comparison" / "MetaMathQA" / "run.py").write_text("")
    with pytest.raises(SystemExit, match=r"k21: no such experiment; give one of llama-3\.2-3B-k1, "):
        wrapper.main([str(tmp_path), "k21"])
